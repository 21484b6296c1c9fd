// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	intoto "github.com/in-toto/in-toto-golang/in_toto"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/frontend/attestations"
	"github.com/moby/buildkit/frontend/attestations/sbom"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/result"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/engine/provenance"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/attestation"
	"github.com/seed-68981b69/slipway/frontend/dockerfile"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
)

// annotationPredicate says of an attachment of a build's record what kind of predicate it is.
const annotationPredicate = "in-toto.io/predicate-type"

// attests is what a client wants to be told about its result.
type attests struct {
	provenance *provenance.Options
	sbom       *sbomRequest
	// builderID is told in the build's own record too.
	builderID string
}

// sbomRequest asks for a scan of the result.
type sbomRequest struct {
	scanner     string
	params      map[string]string
	ignoreCache bool
	resolveMode string
}

// parseAttests reads the frontend attributes attest:NAME, and removes from opts those that are disabled: frontends do not know that word.
func parseAttests(opts map[string]string) (attests, error) {
	for key, value := range opts {
		if strings.HasPrefix(key, "attest:") && disabled(value) {
			delete(opts, key)
		}
	}
	parsed, err := attestations.Parse(opts)
	if err != nil {
		return attests{}, err
	}
	for kind, attrs := range parsed {
		// docker buildx says again what the name of the attribute says.
		if typ, ok := attrs["type"]; ok && typ != kind {
			return attests{}, fmt.Errorf("attestation %s: type=%s", kind, typ)
		}
		delete(attrs, "type")
	}
	var a attests
	if attrs, ok := parsed[attestations.KeyTypeProvenance]; ok {
		o, err := provenance.ParseOptions(attrs)
		if err != nil {
			return attests{}, err
		}
		a.provenance, a.builderID = &o, o.BuilderID
	}
	if attrs, ok := parsed[attestations.KeyTypeSbom]; ok {
		named, err := reference.ParseNormalizedNamed(attrs["generator"])
		if err != nil {
			return attests{}, fmt.Errorf("attestation sbom: generator %q: %w", attrs["generator"], err)
		}
		a.sbom = &sbomRequest{scanner: reference.TagNameOnly(named).String(), params: map[string]string{}, resolveMode: opts["image-resolve-mode"]}
		for key, value := range attrs {
			if key != "generator" && key != "disabled" {
				a.sbom.params[key] = value
			}
		}
		noCache, given := opts["no-cache"]
		a.sbom.ignoreCache = given && noCache == ""
	}
	return a, nil
}

// disabled recognises an attestation that is asked not to be made.
func disabled(attrs string) bool {
	return slices.Contains(strings.Split(attrs, ","), "disabled=true")
}

// explain says more about an error that comes from a scanner that cannot be had.
func (r *sbomRequest) explain(err error) error {
	if r == nil || err == nil {
		return err
	}
	named, perr := reference.ParseNormalizedNamed(r.scanner)
	if perr != nil || !strings.Contains(err.Error(), named.Name()) && !strings.Contains(err.Error(), reference.FamiliarName(named)) {
		return err
	}
	return fmt.Errorf("attestation sbom: scanner %s (another one is chosen with generator=IMAGE): %w", reference.FamiliarString(named), err)
}

// scan adds an SBOM to each platform of res, unless the frontend has brought some already. The scanner is an image that is run on the
// result; it leaves a bundle of statements.
func (r *sbomRequest) scan(ctx context.Context, client *gateway.Client, res *gwclient.Result) error {
	if r == nil || sbom.HasSBOM(res) {
		return nil
	}
	ps, err := exptypes.ParsePlatforms(res.Metadata)
	if err != nil {
		return err
	}
	platform := client.BuildOpts().Workers[0].Platforms[0]
	scanner, err := sbom.CreateSBOMScanner(ctx, client, r.scanner, platform, sourceresolver.Opt{
		ImageOpt: &sourceresolver.ResolveImageOpt{ResolveMode: r.resolveMode, Platform: &platform},
	}, r.params)
	if err != nil {
		return err
	}
	for _, p := range ps.Platforms {
		given, _ := res.FindRef(p.ID)
		ref, err := gateway.AsReference(given)
		if err != nil {
			return err
		}
		if ref == nil {
			continue // nothing to scan
		}
		st, err := ref.ToState()
		if err != nil {
			return err
		}
		var opts []llb.ConstraintsOpt
		if r.ignoreCache {
			opts = append(opts, llb.IgnoreCache)
		}
		att, err := scanner(ctx, p.ID, st, nil, opts...)
		if err != nil {
			return err
		}
		solved, err := result.ConvertAttestation(&att, func(st *llb.State) (gwclient.Reference, error) {
			def, err := st.Marshal(ctx)
			if err != nil {
				return nil, err
			}
			scanned, err := client.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB()})
			if err != nil {
				return nil, err
			}
			return scanned.Ref, nil
		})
		if err != nil {
			return err
		}
		res.AddAttestation(p.ID, *solved)
	}
	return nil
}

// readAttestations reads what the frontend and scanners say, which is solved for it, by platform.
func (s *Server) readAttestations(ctx context.Context, res *gwclient.Result) (map[string][]exporter.Attestation, error) {
	out := map[string][]exporter.Attestation{}
	for platform, list := range res.Attestations {
		var given []attestation.Given
		for _, a := range list {
			g := attestation.Given{Kind: a.Kind, Metadata: a.Metadata, Path: a.Path, InToto: a.InToto}
			if a.Ref != nil {
				snap, err := gateway.Snapshot(ctx, a.Ref)
				if err != nil {
					return nil, err
				}
				if g.Ref, err = s.View(ctx, snap); err != nil {
					return nil, err
				}
			}
			given = append(given, g)
		}
		var err error
		if out[platform], err = attestation.Read(ctx, given); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// origin is where a result comes from.
type origin struct {
	facts map[string]*provenance.Facts // by platform, as far as there is anything
	order []string                     // of the platforms
	// multiPlatform says that the result is a map of platforms.
	multiPlatform bool

	mu     sync.Mutex                     // guards layers
	layers map[string]exporter.LayerBlobs // by platform, as the last export that has layers names them
}

// named notes how an export names the layers of a platform.
func (o *origin) named(platform string, layers exporter.LayerBlobs) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.layers[platform] = layers
}

// newOrigin begins to keep what a build's provenance will say.
func (s *Server) newOrigin(b *solver.Build, req *request, started time.Time) *provenance.Build {
	return &provenance.Build{
		Solver: b, Request: gateway.Request{Frontend: req.frontend, Opts: req.opts, Inputs: req.inputs},
		Requests:     s.requests,
		InvocationID: strings.ToLower(rand.Text()), Started: started, CompatibilityVersion: currentCompatibility,
		DockerfileFrontend: dockerfile.Name, DockerfileVersion: dockerfile.Version(),
		Environment: s.ProvenanceEnvironment,
	}
}

// capture collects the facts about res, which has been evaluated.
func capture(b *provenance.Build, res *gwclient.Result) (*origin, error) {
	ps, err := exptypes.ParsePlatforms(res.Metadata)
	if err != nil {
		return nil, err
	}
	var all []*gateway.Reference
	collect := func(given gwclient.Reference) error {
		ref, err := gateway.AsReference(given)
		if ref != nil {
			all = append(all, ref)
		}
		return err
	}
	if err := res.EachRef(collect); err != nil {
		return nil, err
	}
	o := &origin{facts: map[string]*provenance.Facts{}, layers: map[string]exporter.LayerBlobs{}, multiPlatform: len(res.Refs) > 0}
	for _, p := range ps.Platforms {
		given, _ := res.FindRef(p.ID)
		ref, err := gateway.AsReference(given)
		if err != nil {
			return nil, err
		}
		if ref == nil {
			continue // nothing comes from nowhere
		}
		if o.facts[p.ID], err = b.Capture(ref, p.ID, ps.Platforms, all); err != nil {
			return nil, err
		}
		o.order = append(o.order, p.ID)
	}
	return o, nil
}

// attach adds to r what was asked for.
func (a attests) attach(r *exporter.Result, o *origin, read map[string][]exporter.Attestation) error {
	for i := range r.Refs {
		ref := &r.Refs[i]
		ref.Attestations = append(ref.Attestations, read[ref.ID]...)
		delete(read, ref.ID)
		facts := o.facts[ref.ID]
		if a.provenance == nil || facts == nil {
			continue
		}
		att, err := facts.Attestation(*a.provenance)
		if err != nil {
			return err
		}
		ref.Attestations = append(ref.Attestations, att)
	}
	for _, id := range slices.Sorted(maps.Keys(read)) {
		if len(read[id]) > 0 {
			return fmt.Errorf("the frontend has an attestation for platform %q, which the result does not have", id)
		}
	}
	return nil
}

// keep stores the provenance of a build beside its record, all that is known, and names it there: once for each platform.
func (o *origin) keep(ctx context.Context, rec *controlapi.BuildHistoryRecord, builderID string, put func(mediaType string, data []byte) (*controlapi.Descriptor, error)) error {
	if o == nil {
		return nil
	}
	opts := provenance.Options{Mode: provenance.Max, Version: types.ProvenanceSLSA1, BuilderID: builderID}
	for _, id := range o.order {
		data, err := o.facts[id].Predicate(ctx, opts, o.layers[id])
		if err != nil {
			return err
		}
		desc, err := put(intoto.PayloadType, data)
		if err != nil {
			return err
		}
		desc.Annotations = map[string]string{annotationPredicate: opts.PredicateType()}
		info := rec.Result
		if o.multiPlatform {
			if rec.Results == nil {
				rec.Results = map[string]*controlapi.BuildResultInfo{}
			}
			info = &controlapi.BuildResultInfo{}
			rec.Results[id] = info
		}
		info.Attestations = append(info.Attestations, desc)
	}
	return nil
}

// namedByIndex are the blobs of an index with attestations that clients read: the manifests, their configs and the statements. Others have
// none, and clients have their image.
func (s *Server) namedByIndex(result *controlapi.Descriptor) ([]digest.Digest, error) {
	if result.MediaType != ocispec.MediaTypeImageIndex {
		return nil, nil
	}
	index := digest.Digest(result.Digest)
	raw, err := s.History.Blobs.ReadAll(index)
	if err != nil {
		return nil, err
	}
	var doc ocispec.Index
	if err := json.Unmarshal(raw, &doc); err != nil || len(doc.Manifests) == 0 {
		return nil, err
	}
	names := []digest.Digest{index}
	for _, d := range doc.Manifests {
		raw, err := s.History.Blobs.ReadAll(d.Digest)
		if err != nil {
			return nil, err
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, err
		}
		names = append(names, d.Digest, m.Config.Digest)
		for _, l := range m.Layers {
			if l.MediaType == intoto.PayloadType {
				names = append(names, l.Digest)
			}
		}
	}
	return names, nil
}
