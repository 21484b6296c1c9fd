// SPDX-License-Identifier: Apache-2.0

// Package history keeps what is known of builds after they have ended: BuildKit's record of each, which names its log and
// our explanation among the blobs, and lists of the files that steps saw of their inputs. It is bounded by number and
// by size; builds that are pinned do not count and stay.
package history

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/record"
)

// The buckets of the record database that belong to this package. Blobs that their values name must be kept.
const (
	Bucket       = "history"
	InputsBucket = "history.inputs"
)

const (
	defaultMaxBuilds = 200
	defaultMaxBytes  = 256 << 20
)

// ErrNotFound is wrapped by errors about builds that the history does not have.
var ErrNotFound = errors.New("no such build in the history")

// Options are what a Store works with.
type Options struct {
	Records *record.Store
	Blobs   *blob.Store
	// MaxBuilds is how many builds are kept; 0 means 200, or none but those of MaxAge when that is set. With MaxAge only builds that
	// are older go because they are too many (BuildKit's rule). MaxBytes bounds the blobs of builds, and separately those of
	// input lists, in bytes; 0 means 256 MiB. The newest build is kept in any case.
	MaxBuilds int
	MaxAge    time.Duration
	MaxBytes  int64
	// Off keeps nothing new; what is there stays.
	Off bool
	Log *slog.Logger
}

// Store is the history. Its methods may be called concurrently.
type Store struct {
	Options

	mu      sync.Mutex // guards what follows
	active  map[string]*controlapi.BuildHistoryRecord
	ended   map[string]*entry
	closing map[string]chan struct{} // active builds that have ended and are being written down
	listen  map[chan *controlapi.BuildHistoryEvent]bool
	closed  chan struct{}
	keep    sync.Mutex // one list of inputs is written at a time
}

// entry is one value of Bucket.
type entry struct {
	Record []byte          `json:"record"` // a BuildHistoryRecord
	Blobs  []digest.Digest `json:"blobs"`  // all that stay for it
	Own    []digest.Digest `json:"own"`    // those of Blobs that were made for the history
	Bytes  int64           `json:"bytes"`  // of Own

	record *controlapi.BuildHistoryRecord
}

// Open reads the history. What cannot be read is dropped.
func Open(o Options) (*Store, error) {
	if o.MaxBuilds <= 0 && o.MaxAge <= 0 {
		o.MaxBuilds = defaultMaxBuilds
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = defaultMaxBytes
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		Options: o, active: map[string]*controlapi.BuildHistoryRecord{}, ended: map[string]*entry{},
		closing: map[string]chan struct{}{}, listen: map[chan *controlapi.BuildHistoryEvent]bool{}, closed: make(chan struct{}),
	}
	bad := map[string][]byte{}
	err := o.Records.WalkValues(Bucket, func(ref string, value []byte) error {
		e := &entry{record: &controlapi.BuildHistoryRecord{}}
		err := json.Unmarshal(value, e)
		if err == nil {
			err = proto.Unmarshal(e.Record, e.record)
		}
		if err != nil {
			o.Log.Warn("a build record cannot be read", "build", ref, "error", err)
			bad[ref] = nil
			return nil
		}
		s.ended[ref] = e
		return nil
	})
	if err == nil && len(bad) > 0 {
		err = o.Records.ChangeValues(Bucket, bad)
	}
	if err == nil {
		s.mu.Lock()
		err = s.trim()
		s.mu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("open build history: %w", err)
	}
	return s, nil
}

// Close ends all Listen calls.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.closed:
	default:
		close(s.closed)
	}
}

// Started says that a build has begun.
func (s *Store) Started(rec *controlapi.BuildHistoryRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active[rec.Ref] = rec
	s.send(controlapi.BuildHistoryEventType_STARTED, rec)
}

// Closing says that a build has ended and that Completed or Abandoned will follow. Who asks for the history waits for it.
func (s *Store) Closing(ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing[ref] == nil {
		s.closing[ref] = make(chan struct{})
	}
}

// Abandoned ends what Started and Closing began without a record.
func (s *Store) Abandoned(ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gone(ref)
}

// gone takes a build from the active ones. mu is held.
func (s *Store) gone(ref string) {
	delete(s.active, ref)
	if c := s.closing[ref]; c != nil {
		close(c)
		delete(s.closing, ref)
	}
}

// Completed keeps the record of a build that has ended. own are blobs that were made for it, also those beside the ones
// that it names as logs and attachments (logs of steps that failed); shared are others that it needs.
func (s *Store) Completed(rec *controlapi.BuildHistoryRecord, own []ocispec.Descriptor, shared []digest.Digest) error {
	e := &entry{record: proto.CloneOf(rec), Blobs: slices.Clone(shared)}
	for _, d := range own {
		e.Own = append(e.Own, d.Digest)
		e.Blobs = append(e.Blobs, d.Digest)
		e.Bytes += d.Size
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.gone(rec.Ref)
	if err := s.put(rec.Ref, e); err != nil {
		return err
	}
	s.send(controlapi.BuildHistoryEventType_COMPLETE, e.record)
	return s.trim()
}

// put writes an entry. mu is held.
func (s *Store) put(ref string, e *entry) error {
	var err error
	if e.Record, err = proto.Marshal(e.record); err != nil {
		return fmt.Errorf("keep build record: %w", err)
	}
	value, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("keep build record: %w", err)
	}
	if err := s.Records.PutValue(Bucket, ref, value); err != nil {
		return fmt.Errorf("keep build record: %w", err)
	}
	s.ended[ref] = e
	return nil
}

// trim deletes the oldest builds that are too many or too much. mu is held.
func (s *Store) trim() error {
	number, size := 0, int64(0)
	for i, ref := range s.refs() {
		e := s.ended[ref]
		if e.record.Pinned {
			continue
		}
		number++
		size += e.Bytes
		tooMany := number > s.MaxBuilds && (s.MaxAge <= 0 || time.Since(e.record.CompletedAt.AsTime()) > s.MaxAge)
		if i > 0 && (tooMany || size > s.MaxBytes) {
			if err := s.remove(ref); err != nil {
				return err
			}
		}
	}
	return nil
}

// refs returns the builds that have ended, newest first. mu is held.
func (s *Store) refs() []string {
	refs := make([]string, 0, len(s.ended))
	for ref := range s.ended {
		refs = append(refs, ref)
	}
	slices.SortFunc(refs, func(a, b string) int {
		if c := s.ended[b].record.CreatedAt.AsTime().Compare(s.ended[a].record.CreatedAt.AsTime()); c != 0 {
			return c
		}
		return bytes.Compare([]byte(a), []byte(b))
	})
	return refs
}

// remove deletes a build and the blobs that no other has. mu is held.
func (s *Store) remove(ref string) error {
	e := s.ended[ref]
	if err := s.Records.DeleteValue(Bucket, ref); err != nil {
		return fmt.Errorf("delete build record: %w", err)
	}
	delete(s.ended, ref)
	s.send(controlapi.BuildHistoryEventType_DELETED, &controlapi.BuildHistoryRecord{Ref: ref})
	for _, d := range e.Own {
		if !s.named(d) {
			if err := s.Blobs.Delete(d); err != nil && !errors.Is(err, blob.ErrNotFound) && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("delete build record: %w", err)
			}
		}
	}
	return nil
}

// named reports whether a build names the blob. mu is held.
func (s *Store) named(d digest.Digest) bool {
	for _, e := range s.ended {
		if slices.Contains(e.Blobs, d) {
			return true
		}
	}
	return false
}

// Names reports whether a build that is kept names the blob. Only those blobs are for clients to read.
func (s *Store) Names(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.named(d)
}

// Settle waits until builds that have ended are written down.
func (s *Store) Settle(ctx context.Context) error {
	s.mu.Lock()
	var waiting []chan struct{}
	for _, c := range s.closing {
		waiting = append(waiting, c)
	}
	s.mu.Unlock()
	for _, c := range waiting {
		select {
		case <-c:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Get returns the record of a build that has ended. The error wraps ErrNotFound when there is none.
func (s *Store) Get(ctx context.Context, ref string) (*controlapi.BuildHistoryRecord, error) {
	if err := s.Settle(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.ended[ref]
	if e == nil {
		return nil, fmt.Errorf("build %s: %w", ref, ErrNotFound)
	}
	return proto.CloneOf(e.record), nil
}

// Newest returns at most n records of builds that have ended, newest first.
func (s *Store) Newest(n int) []*controlapi.BuildHistoryRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*controlapi.BuildHistoryRecord
	for _, ref := range s.refs() {
		if len(out) == n {
			break
		}
		out = append(out, s.ended[ref].record)
	}
	return out
}

// Pin sets whether a build is exempt from the limits.
func (s *Store) Pin(ctx context.Context, ref string, pinned bool) error {
	if err := s.Settle(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.ended[ref]
	if old == nil {
		return fmt.Errorf("build %s: %w", ref, ErrNotFound)
	}
	e := *old
	e.record = proto.CloneOf(old.record)
	e.record.Pinned = pinned
	e.record.Generation++
	if err := s.put(ref, &e); err != nil {
		return err
	}
	s.send(controlapi.BuildHistoryEventType_COMPLETE, e.record)
	return nil
}

// Attach changes the record of a build that has ended and gives it further blobs of its own. A build that has been deleted
// meanwhile stays so, and its blobs are nobody's.
func (s *Store) Attach(ref string, own []ocispec.Descriptor, change func(*controlapi.BuildHistoryRecord)) error {
	if err := s.Settle(context.Background()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.ended[ref]
	if old == nil {
		return nil
	}
	e := *old
	e.record = proto.CloneOf(old.record)
	change(e.record)
	e.record.Generation++
	e.Own, e.Blobs = slices.Clone(old.Own), slices.Clone(old.Blobs)
	for _, d := range own {
		e.Own = append(e.Own, d.Digest)
		e.Blobs = append(e.Blobs, d.Digest)
		e.Bytes += d.Size
	}
	if err := s.put(ref, &e); err != nil {
		return err
	}
	s.send(controlapi.BuildHistoryEventType_COMPLETE, e.record)
	return s.trim()
}

// Delete deletes a build. A build that has not ended cannot be deleted.
func (s *Store) Delete(ctx context.Context, ref string) error {
	if err := s.Settle(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active[ref] != nil {
		return fmt.Errorf("build %s has not ended", ref)
	}
	if s.ended[ref] == nil {
		return fmt.Errorf("build %s: %w", ref, ErrNotFound)
	}
	return s.remove(ref)
}
