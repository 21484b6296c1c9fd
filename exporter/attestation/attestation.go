// SPDX-License-Identifier: Apache-2.0

// Package attestation turns what frontends and scanners say about a result into in-toto statements, by BuildKit's rules: a frontend
// returns predicates as files, or bundles of statements as directories, and never provenance, which only the engine can vouch for.
package attestation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	intoto "github.com/in-toto/in-toto-golang/in_toto"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/result"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/exporter"
)

// ProvenancePrefix is how the predicate types of provenance begin.
const ProvenancePrefix = "https://slsa.dev/provenance/"

// maxBytes bounds one file with a predicate or statement: BuildKit's limit.
const maxBytes = 80 << 20

// maxBundle is how many statements one bundle may have.
const maxBundle = 1000

// maxTotal bounds all that is read for one platform, which is in memory until it is exported. BuildKit has no such limit.
const maxTotal = 4 * maxBytes

// Given is an attestation as a frontend returns it; Ref has its files, nil when it has none.
type Given = result.Attestation[layer.Files]

// Read reads what a frontend or scanner has returned for one platform, and takes bundles apart. The SPDX document of the result itself
// comes first, as in BuildKit.
func Read(ctx context.Context, given []Given) ([]exporter.Attestation, error) {
	return readAll(ctx, given, &reader{left: maxTotal})
}

// reader reads files until there are too many bytes in memory.
type reader struct {
	left int64 // bytes that may still be read
}

func readAll(ctx context.Context, given []Given, r *reader) ([]exporter.Attestation, error) {
	var out []exporter.Attestation
	for _, g := range given {
		var list []exporter.Attestation
		var err error
		switch g.Kind {
		case gwpb.AttestationKind_InToto:
			list, err = r.predicate(ctx, g)
		case gwpb.AttestationKind_Bundle:
			list, err = r.bundle(ctx, g)
		default:
			err = fmt.Errorf("kind %s is not supported", g.Kind)
		}
		if err != nil {
			return nil, fmt.Errorf("attestation %q of the frontend: %w", g.Path, err)
		}
		out = append(out, list...)
	}
	slices.SortStableFunc(out, func(a, b exporter.Attestation) int {
		switch {
		case a.CoreSBOM == b.CoreSBOM:
			return 0
		case a.CoreSBOM:
			return -1
		}
		return 1
	})
	return out, nil
}

func (r *reader) predicate(ctx context.Context, g Given) ([]exporter.Attestation, error) {
	switch {
	case g.Path == "":
		return nil, errors.New("it has no path")
	case g.Ref == nil:
		return nil, errors.New("it has no content")
	}
	data, err := r.file(ctx, g.Ref, g.Path)
	if err != nil {
		return nil, err
	}
	data = bytes.TrimSpace(data)
	if len(data) == 0 {
		data = []byte("null")
	}
	if !json.Valid(data) {
		return nil, errors.New("the predicate is not JSON")
	}
	a, err := newAttestation(g, g.Path, g.InToto.PredicateType, g.InToto.Subjects, data)
	return []exporter.Attestation{a}, err
}

func (r *reader) bundle(ctx context.Context, g Given) ([]exporter.Attestation, error) {
	if g.Ref == nil {
		return nil, errors.New("the bundle has no content")
	}
	dir, err := index.Resolve(g.Ref, g.Path, true)
	if err != nil {
		return nil, err
	}
	if e, ok := g.Ref.Lookup(dir); !ok && dir != "" || ok && e.Type != index.Dir {
		return nil, errors.New("the bundle is not a directory")
	}
	entries := g.Ref.ReadDir(dir)
	if len(entries) > maxBundle {
		return nil, fmt.Errorf("the bundle has %d files, more than %d", len(entries), maxBundle)
	}
	var out []exporter.Attestation
	for _, e := range entries {
		name := path.Join(g.Path, path.Base(e.Path))
		data, err := r.file(ctx, g.Ref, e.Path)
		if err != nil {
			return nil, err
		}
		var stmt Statement
		if err := json.Unmarshal(data, &stmt); err != nil {
			return nil, fmt.Errorf("%s is not an in-toto statement: %w", name, err)
		}
		if want := g.InToto.PredicateType; want != "" && stmt.PredicateType != want {
			return nil, fmt.Errorf("%s has predicate type %s, not %s", name, stmt.PredicateType, want)
		}
		subjects := make([]result.InTotoSubject, len(stmt.Subject))
		for i, s := range stmt.Subject {
			subjects[i] = result.InTotoSubject{Kind: gwpb.InTotoSubjectKind_Raw, Name: s.Name, Digest: result.FromDigestMap(s.Digest)}
		}
		a, err := newAttestation(g, name, stmt.PredicateType, subjects, stmt.Predicate)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// newAttestation makes the attestation of one predicate.
func newAttestation(g Given, name, predicateType string, subjects []result.InTotoSubject, predicate json.RawMessage) (exporter.Attestation, error) {
	if strings.HasPrefix(predicateType, ProvenancePrefix) {
		return exporter.Attestation{}, errors.New("a frontend may not say where a build comes from (provenance)")
	}
	core, isCore := g.Metadata[result.AttestationSBOMCore]
	stem, _, _ := strings.Cut(path.Base(name), ".")
	return exporter.Attestation{
		Path: name, PredicateType: predicateType, Subjects: subjects,
		InlineOnly: string(g.Metadata[result.AttestationInlineOnlyKey]) == "true",
		CoreSBOM:   isCore && stem == string(core) && predicateType == intoto.PredicateSPDX,
		Predicate: func(context.Context, exporter.LayerBlobs) (json.RawMessage, error) {
			return predicate, nil
		},
	}, nil
}

// file reads a regular file, whose name is resolved inside files.
func (r *reader) file(ctx context.Context, files layer.Files, name string) ([]byte, error) {
	resolved, err := index.Resolve(files, name, true)
	if err != nil {
		return nil, err
	}
	e, ok := files.Lookup(resolved)
	switch {
	case !ok:
		return nil, fmt.Errorf("%s is not there", name)
	case e.Type != index.File:
		return nil, fmt.Errorf("%s is not a regular file", name)
	case e.Size > maxBytes:
		return nil, fmt.Errorf("%s has %d bytes, more than %d", name, e.Size, int64(maxBytes))
	case e.Size > r.left:
		return nil, fmt.Errorf("%s: the attestations of one platform have more than %d bytes together", name, int64(maxTotal))
	}
	r.left -= e.Size
	f, err := files.OpenFile(ctx, resolved)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBytes))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data, nil
}

// Statement is an in-toto statement as it is stored.
type Statement struct {
	Type          string             `json:"_type"`
	PredicateType string             `json:"predicateType"`
	Subject       []StatementSubject `json:"subject"`
	Predicate     json.RawMessage    `json:"predicate"`
}

// StatementSubject is what a Statement is about; digests are by algorithm.
type StatementSubject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// Subject is something with a digest that statements are about.
type Subject struct {
	Name   string
	Digest digest.Digest
}

// NewStatement makes the statement of a about self, which is the result as it is exported, or about what a names itself.
func NewStatement(a exporter.Attestation, predicate json.RawMessage, self []Subject) (Statement, error) {
	given := a.Subjects
	if len(given) == 0 {
		given = []result.InTotoSubject{{Kind: gwpb.InTotoSubjectKind_Self}}
	}
	subjects := []StatementSubject{}
	for _, s := range given {
		switch s.Kind {
		case gwpb.InTotoSubjectKind_Self:
			for _, me := range self {
				digests := result.ToDigestMap(me.Digest)
				subjects = append(subjects, StatementSubject{Name: me.Name, Digest: digests})
				if s.Name != "" && s.Name != "_" {
					subjects = append(subjects, StatementSubject{Name: s.Name, Digest: digests})
				}
			}
		case gwpb.InTotoSubjectKind_Raw:
			for _, d := range s.Digest {
				if strings.IndexByte(d.String(), ':') < 1 { // any algorithm will do: statements name commits, too
					return Statement{}, fmt.Errorf("attestation %s: subject %q: %q is not a digest", a.Path, s.Name, d)
				}
			}
			name := s.Name
			if name == "" {
				name = "_"
			}
			subjects = append(subjects, StatementSubject{Name: name, Digest: result.ToDigestMap(s.Digest...)})
		default:
			return Statement{}, fmt.Errorf("attestation %s: subjects of kind %s are not supported", a.Path, s.Kind)
		}
	}
	return Statement{Type: intoto.StatementInTotoV1, PredicateType: a.PredicateType, Subject: subjects, Predicate: predicate}, nil
}
