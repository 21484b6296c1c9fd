// SPDX-License-Identifier: Apache-2.0

package history

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	controlapi "github.com/moby/buildkit/api/services/control"
)

// listenBuffer is how many events a client may be behind before it is let go.
const listenBuffer = 256

// send tells everybody who listens. mu is held.
func (s *Store) send(kind controlapi.BuildHistoryEventType, rec *controlapi.BuildHistoryRecord) {
	for c := range s.listen {
		select {
		case c <- &controlapi.BuildHistoryEvent{Type: kind, Record: rec}:
		default: // it reads too slowly
			delete(s.listen, c)
			close(c)
		}
	}
}

// Listen sends what BuildKit sends for such a request: running builds, then those that have ended, newest first, and then,
// unless the request says that this is all, what happens from now on. Filters and the limit are for builds that have ended.
func (s *Store) Listen(ctx context.Context, req *controlapi.BuildHistoryRequest, send func(*controlapi.BuildHistoryEvent) error) error {
	match, err := parseFilters(req.Filter)
	if err != nil {
		return err
	}
	if req.Limit < 0 {
		return fmt.Errorf("invalid limit %d", req.Limit)
	}
	if err := s.Settle(ctx); err != nil {
		return err
	}

	events := make(chan *controlapi.BuildHistoryEvent, listenBuffer)
	var first []*controlapi.BuildHistoryEvent
	s.mu.Lock()
	for ref, rec := range s.active {
		if req.Ref == "" || req.Ref == ref {
			first = append(first, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_STARTED, Record: rec})
		}
	}
	if !req.ActiveOnly {
		n := int32(0)
		for _, ref := range s.refs() {
			rec := s.ended[ref].record
			if req.Ref != "" && req.Ref != ref || !match(rec) || req.Limit > 0 && n == req.Limit {
				continue
			}
			n++
			first = append(first, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: rec})
		}
	}
	if !req.EarlyExit {
		s.listen[events] = true
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.listen, events)
	}()

	for _, e := range first {
		if err := send(e); err != nil {
			return err
		}
	}
	if req.EarlyExit {
		return nil
	}
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return fmt.Errorf("the client is more than %d events behind", listenBuffer)
			}
			if req.Ref != "" && req.Ref != e.Record.Ref {
				continue
			}
			if err := send(e); err != nil {
				return err
			}
		case <-s.closed:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

type predicate func(*controlapi.BuildHistoryRecord) bool

// parseFilters understands BuildKit's filters: comma-separated conditions of one filter must all hold, and one filter of
// several. Conditions are containerd's on ref, status (running, completed, error, canceled) and repository, and
// comparisons of startedAt, completedAt (a duration ago, or a time) and duration.
func parseFilters(in []string) (predicate, error) {
	if len(in) == 0 {
		return func(*controlapi.BuildHistoryRecord) bool { return true }, nil
	}
	var any []predicate
	for _, f := range in {
		var all []predicate
		var static []string
		for _, condition := range strings.Split(f, ",") {
			p, err := compareTime(condition)
			if err != nil {
				return nil, err
			}
			if p == nil {
				static = append(static, condition)
				continue
			}
			all = append(all, p)
		}
		if len(static) > 0 {
			filter, err := filters.Parse(strings.Join(static, ","))
			if err != nil {
				return nil, fmt.Errorf("filter %q: %w", f, err)
			}
			all = append(all, func(rec *controlapi.BuildHistoryRecord) bool { return filter.Match(adapt(rec)) })
		}
		any = append(any, func(rec *controlapi.BuildHistoryRecord) bool {
			return !slices.ContainsFunc(all, func(p predicate) bool { return !p(rec) })
		})
	}
	return func(rec *controlapi.BuildHistoryRecord) bool {
		return slices.ContainsFunc(any, func(p predicate) bool { return p(rec) })
	}, nil
}

// compareTime reads "startedAt>1h". It returns nil for conditions of another form.
func compareTime(condition string) (predicate, error) {
	for _, op := range []string{">=", "<=", ">", "<"} {
		key, value, ok := strings.Cut(condition, op)
		if !ok {
			continue
		}
		var want int64
		d, err := time.ParseDuration(value)
		switch key {
		case "startedAt", "completedAt":
			at := time.Now().Add(-d)
			if err != nil {
				if at, err = time.Parse(time.RFC3339, value); err != nil {
					return nil, fmt.Errorf("filter %q: want a duration or a time as 2006-01-02T15:04:05Z", condition)
				}
			}
			want = at.Unix()
		case "duration":
			if err != nil {
				return nil, fmt.Errorf("filter %q: %w", condition, err)
			}
			want = int64(d)
		default:
			return nil, nil
		}
		return func(rec *controlapi.BuildHistoryRecord) bool {
			var got int64
			switch {
			case key == "startedAt":
				got = rec.CreatedAt.AsTime().Unix()
			case rec.CompletedAt == nil:
			case key == "completedAt":
				got = rec.CompletedAt.AsTime().Unix()
			default:
				got = int64(rec.CompletedAt.AsTime().Sub(rec.CreatedAt.AsTime()))
			}
			switch op {
			case ">=":
				return got >= want
			case "<=":
				return got <= want
			case ">":
				return got > want
			default:
				return got < want
			}
		}, nil
	}
	return nil, nil
}

// Status is BuildKit's word for how a build has ended.
func Status(rec *controlapi.BuildHistoryRecord) string {
	switch {
	case rec.CompletedAt == nil:
		return "running"
	case rec.Error == nil:
		return "completed"
	case strings.Contains(rec.Error.Message, context.Canceled.Error()):
		return "canceled"
	}
	return "error"
}

func adapt(rec *controlapi.BuildHistoryRecord) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) != 1 {
			return "", false
		}
		switch path[0] {
		case "ref":
			return rec.Ref, rec.Ref != ""
		case "status":
			return Status(rec), true
		case "repository":
			if v, ok := rec.FrontendAttrs["vcs:source"]; ok {
				return v, true
			}
			v, ok := rec.FrontendAttrs["context"]
			v, _, _ = strings.Cut(v, "#")
			return v, ok
		}
		return "", false
	})
}
