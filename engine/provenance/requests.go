// SPDX-License-Identifier: Apache-2.0

package provenance

import (
	"maps"
	"slices"
	"sync"

	"github.com/moby/buildkit/solver/llbsolver/provenance"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/frontend/gateway"
)

// Requests keeps which requests the results of running builds come from, so that another build that is given such a result as an input can
// say where that comes from. Its methods may be called concurrently.
type Requests struct {
	mu     sync.Mutex // guards byHead
	byHead map[digest.Digest][]solved
}

// solved is what a frontend has returned in a build.
type solved struct {
	build *Build
	ref   *gateway.Reference
}

// NewRequests returns a Requests.
func NewRequests() *Requests { return &Requests{byHead: map[digest.Digest][]solved{}} }

// Add notes that a frontend of b has returned ref.
func (r *Requests) Add(b *Build, ref *gateway.Reference) {
	head, ok := headOf(ref.Definition())
	if !ok {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byHead[head] = append(r.byHead[head], solved{b, ref})
}

// Forget drops what b has added: the build has ended.
func (r *Requests) Forget(b *Build) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for head, list := range r.byHead {
		list = slices.DeleteFunc(list, func(s solved) bool { return s.build == b })
		if len(list) == 0 {
			delete(r.byHead, head)
		} else {
			r.byHead[head] = list
		}
	}
}

// teller tells of requests, of the requests that made their inputs, and so on.
type teller struct {
	requests *Requests // may be nil
	// above are the references whose requests are being told: what a frontend returns may be what it was given.
	above []*gateway.Reference
	// left is how many more requests are told.
	left int
}

// maxTold bounds what clients can have us write down, whose inputs may have many inputs each.
const maxTold = 1000

// tell is a request as others are told of it.
func (t *teller) tell(r gateway.Request, sources types.Sources) *types.RequestProvenance {
	told := provenance.RequestProvenance(r.Frontend, args(r.Opts), sources)
	told.Request.Inputs = t.inputs(r.Inputs)
	return told
}

// inputs are the requests that made definitions, as far as that is known beyond doubt.
func (t *teller) inputs(defs map[string]*pb.Definition) map[string]*types.RequestProvenance {
	if t.requests == nil {
		return nil
	}
	var out map[string]*types.RequestProvenance
	for _, name := range slices.Sorted(maps.Keys(defs)) {
		if told := t.find(defs[name]); told != nil {
			if out == nil {
				out = map[string]*types.RequestProvenance{}
			}
			out[name] = told
		}
	}
	return out
}

func (t *teller) find(def *pb.Definition) *types.RequestProvenance {
	head, ok := headOf(def)
	if !ok {
		return nil
	}
	t.requests.mu.Lock()
	list := slices.Clone(t.requests.byHead[head])
	t.requests.mu.Unlock()
	var told *types.RequestProvenance
	for _, s := range list {
		request := s.ref.By().Request()
		if request == nil || slices.Contains(t.above, s.ref) {
			continue
		}
		if t.left--; t.left < 0 {
			return nil
		}
		c := &provenance.Capture{}
		if s.ref.Evaluated() && s.build.walk(c, s.ref) != nil {
			return nil
		}
		t.above = append(t.above, s.ref)
		mine := t.tell(*request, c.Sources)
		t.above = t.above[:len(t.above)-1]
		if told != nil && !told.Equal(mine) {
			return nil // made twice, by different requests
		}
		told = mine
	}
	return told
}

// headOf is the vertex that a definition points to; false for the definition of nothing.
func headOf(def *pb.Definition) (digest.Digest, bool) {
	if def == nil || len(def.Def) == 0 {
		return "", false
	}
	op := &pb.Op{}
	if op.UnmarshalVT(def.Def[len(def.Def)-1]) != nil || len(op.Inputs) == 0 {
		return "", false
	}
	return digest.Digest(op.Inputs[0].Digest), true
}
