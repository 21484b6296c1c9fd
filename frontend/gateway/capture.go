// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/solver/result"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/solver"
)

// Request is what a frontend was asked for.
type Request struct {
	Frontend string
	Opts     map[string]string
	Inputs   map[string]*pb.Definition
}

// ResolvedImage is an image of which a frontend has asked what it is.
type ResolvedImage struct {
	Ref      string
	Platform *ocispec.Platform
	Digest   digest.Digest
	// Local says that it is in an OCI layout of the client, not in a registry.
	Local bool
}

// asked is what a frontend has asked its Client for, which provenance tells.
type asked struct {
	mu     sync.Mutex // guards what follows
	refs   []*Reference
	images []ResolvedImage
	subs   []*Client
}

func (a *asked) addRef(r *Reference) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refs = append(a.refs, r)
}

func (a *asked) addImage(i ResolvedImage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.images = append(a.images, i)
}

func (a *asked) addSub(c *Client) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.subs = append(a.subs, c)
}

func (a *asked) called() []*Client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.subs)
}

// reportSolved tells of what a frontend has returned.
func (c *Client) reportSolved(res *gwclient.Result) error {
	if c.Solved == nil {
		return nil
	}
	return res.EachRef(func(given gwclient.Reference) error {
		ref, err := AsReference(given)
		if ref != nil {
			c.Solved(ref)
		}
		return err
	})
}

// Request is what the client's frontend was asked for; nil for the client of a build that brings definitions itself.
func (c *Client) Request() *Request { return c.request }

// References are those of this client's frontend and of the frontends that it has called, in no order. Those that were never
// evaluated are among them.
func (c *Client) References() []*Reference {
	c.asked.mu.Lock()
	all := slices.Clone(c.asked.refs)
	c.asked.mu.Unlock()
	for _, sub := range c.asked.called() {
		all = append(all, sub.References()...)
	}
	return all
}

// ResolvedImages are the images that this client's frontend, or one that it has called, has asked about.
func (c *Client) ResolvedImages() []ResolvedImage {
	c.asked.mu.Lock()
	all := slices.Clone(c.asked.images)
	c.asked.mu.Unlock()
	for _, sub := range c.asked.called() {
		all = append(all, sub.ResolvedImages()...)
	}
	return all
}

// By is the client whose frontend has made the reference.
func (r *Reference) By() *Client { return r.by }

// Definition is the LLB that the reference stands for. It must not be changed.
func (r *Reference) Definition() *pb.Definition { return r.definition }

// Edge is what the definition points to.
func (r *Reference) Edge() solver.Edge { return r.edge }

// Evaluated says whether the reference has been solved.
func (r *Reference) Evaluated() bool { return r.evaluated.Load() }

// AsReference returns a reference that came from a Client; nil for scratch.
func AsReference(ref gwclient.Reference) (*Reference, error) {
	switch r := ref.(type) {
	case nil:
		return nil, nil
	case *Reference:
		return r, nil
	}
	return nil, fmt.Errorf("reference of a foreign type %T", ref)
}

// attestationsToPB gives the references of attestations names.
func (b *Bridge) attestationsToPB(in map[string][]result.Attestation[gwclient.Reference]) (map[string]*gwpb.Attestations, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := make(map[string]*gwpb.Attestations, len(in))
	for platform, list := range in {
		out[platform] = &gwpb.Attestations{}
		for _, a := range list {
			p, err := gwclient.AttestationToPB(&a)
			if err != nil {
				return nil, err
			}
			if a.Ref != nil {
				p.Ref = b.add(a.Ref)
			}
			out[platform].Attestation = append(out[platform].Attestation, p)
		}
	}
	return out, nil
}

// attestationsFromPB adds to res what a frontend has returned.
func (b *Bridge) attestationsFromPB(res *gwclient.Result, in map[string]*gwpb.Attestations) error {
	for platform, list := range in {
		for _, p := range list.GetAttestation() {
			if p == nil {
				return errors.New("an attestation of the frontend is empty")
			}
			a, err := gwclient.AttestationFromPB[gwclient.Reference](p)
			if err != nil {
				return err
			}
			ref, err := b.get(p.GetRef().GetId())
			if err != nil {
				return err
			}
			if ref != nil {
				a.Ref = ref
			}
			res.AddAttestation(platform, *a)
		}
	}
	return nil
}
