// SPDX-License-Identifier: Apache-2.0

// Package provenance says where a build's result comes from, in the words of SLSA (https://slsa.dev) and in the form of BuildKit's
// predicates, whose types and rules it takes from BuildKit itself: which frontend was asked for what, what the sources stood for, which steps
// were carried out. Values of secrets are not known here, and addresses lose their credentials.
package provenance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	slsa02 "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v0.2"
	slsa1 "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v1"
	"github.com/moby/buildkit/solver/llbsolver/provenance"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"

	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/frontend/gateway"
)

// Mode is how much is told.
type Mode string

// The modes. Max has everything that is known; Min leaves out build arguments, labels, the names of secrets and the build's definition.
const (
	Min Mode = "min"
	Max Mode = "max"
)

// Options are what a client asks for.
type Options struct {
	Mode    Mode
	Version types.ProvenanceSLSA
	// BuilderID names who builds; Reproducible is the client's word for it.
	BuilderID    string
	Reproducible bool
	// Complete refuses a build that has materials without a digest.
	Complete bool
	// InlineOnly is for images and nothing else. Filename is what exports that write files call it.
	InlineOnly bool
	Filename   string
}

// ParseOptions reads the attributes of "attest:provenance" by BuildKit's defaults. What is not done here is refused by its name.
func ParseOptions(attrs map[string]string) (Options, error) {
	o := Options{Mode: Max, Version: types.ProvenanceSLSA1, Filename: "provenance.json"}
	for _, key := range slices.Sorted(maps.Keys(attrs)) {
		value := attrs[key]
		var err error
		switch key {
		case "mode":
			switch value {
			case "min", "max":
				o.Mode = Mode(value)
			case "full":
				o.Mode = Max
			default:
				err = errors.New("want min or max")
			}
		case "version":
			o.Version = types.ProvenanceSLSA(value)
			err = o.Version.Validate()
		case "builder-id":
			o.BuilderID = value
		case "reproducible":
			o.Reproducible, err = parseBool(value)
		case "complete-materials":
			o.Complete, err = parseBool(value)
		case "inline-only":
			o.InlineOnly, err = parseBool(value)
		case "filename":
			if o.Filename = value; value == "" || strings.Contains(value, "/") || value == "." || value == ".." {
				err = errors.New("not the name of a file")
			}
		case "disabled": // true does not come here
		default:
			return Options{}, fmt.Errorf("attestation provenance: not supported yet: %s=%s", key, value)
		}
		if err != nil {
			return Options{}, fmt.Errorf("attestation provenance: %s=%s: %w", key, value, err)
		}
	}
	return o, nil
}

func parseBool(value string) (bool, error) {
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, errors.New("not true or false")
	}
	return b, nil
}

// PredicateType is the type of the predicates by o.
func (o Options) PredicateType() string {
	if o.Version == types.ProvenanceSLSA02 {
		return slsa02.PredicateSLSAProvenance
	}
	return slsa1.PredicateSLSAProvenance
}

// Facts are what is known of one platform's result when it has been made.
type Facts struct {
	build   *Build
	ref     *gateway.Reference
	capture *provenance.Capture
}

// Incomplete names the materials of which no digest is known: the local sources.
func (f *Facts) Incomplete() []string {
	var names []string
	for _, l := range f.capture.Sources.Local {
		names = append(names, "local source "+l.Name)
	}
	return names
}

// Attestation is the provenance for an export.
func (f *Facts) Attestation(o Options) (exporter.Attestation, error) {
	if missing := f.Incomplete(); o.Complete && len(missing) > 0 {
		return exporter.Attestation{}, fmt.Errorf("attestation provenance: complete-materials=true, but these have no digest that others could find them by: %s", strings.Join(missing, ", "))
	}
	return exporter.Attestation{
		Path: o.Filename, PredicateType: o.PredicateType(), InlineOnly: o.InlineOnly,
		Predicate: func(ctx context.Context, layers exporter.LayerBlobs) (json.RawMessage, error) {
			return f.Predicate(ctx, o, layers)
		},
	}, nil
}

// Predicate makes the predicate. The first one of a build says when the build has ended. layers, which may be nil, are named by those of
// the result.
func (f *Facts) Predicate(ctx context.Context, o Options, layers exporter.LayerBlobs) (json.RawMessage, error) {
	p, err := provenance.NewPredicate(f.capture.Clone())
	if err != nil {
		return nil, fmt.Errorf("provenance: %w", err)
	}
	b := f.build
	started, finished := b.Started.UTC(), b.finished()
	md := p.RunDetails.Metadata
	md.StartedOn, md.FinishedOn = &started, &finished
	md.InvocationID = b.InvocationID
	md.Reproducible = o.Reproducible
	p.RunDetails.Builder.ID = o.BuilderID

	request := &p.BuildDefinition.ExternalParameters.Request
	request.CompatibilityVersion = b.CompatibilityVersion
	if request.Frontend == b.DockerfileFrontend {
		p.BuildDefinition.InternalParameters.DockerfileVersion = b.DockerfileVersion
	}
	if len(b.Environment) > 0 {
		p.BuildDefinition.InternalParameters.ProvenanceCustomEnv = maps.Clone(b.Environment)
	}
	if o.Mode == Min {
		if minimize(request) {
			md.Completeness.Request = false
		}
	} else if err := f.describe(ctx, p, layers); err != nil {
		return nil, fmt.Errorf("provenance: %w", err)
	}
	var v any = p
	if o.Version == types.ProvenanceSLSA02 {
		v = p.ConvertToSLSA02()
	}
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("provenance: %w", err)
	}
	return data, nil
}

// minimize leaves out of a request what mode=min does not tell, and says whether that was anything the result depends on.
func minimize(p *types.Parameters) (incomplete bool) {
	if p == nil {
		return false
	}
	p.Args = maps.Clone(p.Args)
	maps.DeleteFunc(p.Args, func(key, _ string) bool {
		drop := strings.HasPrefix(key, "build-arg:") || strings.HasPrefix(key, "label:")
		incomplete = incomplete || drop
		return drop
	})
	p.Secrets, p.SSH = nil, nil
	for _, in := range p.Inputs {
		if in != nil && minimize(in.Request) {
			incomplete = true
		}
	}
	if p.Root != nil && minimize(p.Root.Request) {
		incomplete = true
	}
	return incomplete
}

// finished is when the build has ended: the first time that somebody asks.
func (b *Build) finished() time.Time {
	b.end.Do(func() {
		now := time.Now
		if b.Now != nil {
			now = b.Now
		}
		b.ended = now().UTC()
	})
	return b.ended
}
