// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"

	gwclient "github.com/moby/buildkit/frontend/gateway/client"

	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
)

// early are the exports that have begun while the build goes on.
type early struct {
	exports []*exporter.Early
	stops   []func() // of the watches
}

// begin has the exporters that can do so work on layers as soon as they are made. It is known by now what the result is going to be: the
// frontend has returned it, if not yet solved. Whatever is wrong, the export itself will say.
func (s *Server) begin(ctx context.Context, session *clientSession, req *request, b *solver.Build, res *gwclient.Result, caches *remotecache.Exports) *early {
	all := &early{}
	refs := res.Refs
	if refs == nil {
		refs = map[string]gwclient.Reference{"": res.Ref}
	}
	none := make(map[string]snapshot.Snapshot, len(refs))
	for id := range refs {
		none[id] = nil
	}
	result, err := exporter.NewResult(res.Metadata, none)
	if err != nil {
		return all
	}
	for _, e := range req.exporters {
		eager, ok := e.(exporter.Eager)
		if !ok {
			continue
		}
		if begun, err := eager.Begin(ctx, result, exporter.Options{Credentials: session.Credentials, Tokens: session}); err == nil && begun != nil {
			all.exports = append(all.exports, begun)
		}
	}
	if len(all.exports) == 0 && !caches.Wanted(false) {
		return all
	}
	for _, ref := range result.Refs {
		given, _ := res.FindRef(ref.ID)
		r, err := gateway.AsReference(given)
		if err != nil || r == nil {
			continue
		}
		all.stops = append(all.stops, b.Watch(r.Edge(), func(snap snapshot.Snapshot) {
			for _, e := range all.exports {
				e.Made(ref, snap)
			}
			caches.Certain(snap)
		}))
	}
	return all
}

// built says that the result is there. The exports come now, which need what has been begun, and go on beside it.
func (e *early) built() {
	for _, stop := range e.stops {
		stop()
	}
}

// end is for after the exports. What is still going on then is stopped after an error, and waited for.
func (e *early) end(err error) {
	for _, x := range e.exports {
		if err != nil {
			x.Stop(err)
		}
		x.Wait()
	}
}
