// SPDX-License-Identifier: Apache-2.0

// Package remotecache is what builds do with shared caches (cache/share): it reads the options of clients, opens the places, answers the
// solver's questions from what is imported, and exports what a build has made and found.
package remotecache

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// The types of places.
const (
	TypeRegistry = "registry"
	TypeLocal    = "local"
	TypeInline   = "inline"
)

// unsupported are BuildKit's other types.
var unsupported = map[string]string{
	"gha":    "the cache of GitHub Actions is not supported: use type=registry with the registry of the repository",
	"azblob": "Azure's blob storage is not supported: use type=registry",
}

// Entry is one place that a client asks for.
type Entry struct {
	Type  string
	Attrs map[string]string
}

// String names the entry, for people.
func (e Entry) String() string {
	switch e.Type {
	case TypeRegistry:
		return e.Attrs["ref"]
	case TypeLocal:
		if src := e.Attrs["src"]; src != "" {
			return "local directory " + src
		}
		return "local directory " + e.Attrs["dest"]
	}
	return e.Type
}

// key tells entries apart.
func (e Entry) key() string {
	var b strings.Builder
	b.WriteString(e.Type)
	for _, name := range slices.Sorted(maps.Keys(e.Attrs)) {
		fmt.Fprintf(&b, "\x00%s=%s", name, e.Attrs[name])
	}
	return b.String()
}

// ImportSpec is a checked place to import from.
type ImportSpec struct {
	Entry
	// Ref is that of a registry, in its full form, and Insecure that it needs no certificate.
	Ref      string
	Insecure bool
	// Dir and Digest are of a directory of the client.
	Dir    string
	Digest digest.Digest
}

// ExportSpec is a checked place to export to.
type ExportSpec struct {
	Entry
	Ref      string
	Insecure bool
	Dir      string
	// Max exports all steps of a build, not only those whose layers its result has.
	Max         bool
	Compression layerblob.Compression
	// IgnoreError makes failures warnings. OnFailure exports what a failed build has finished.
	IgnoreError, OnFailure bool
}

// ParseImport checks an entry of a client's request.
func ParseImport(e Entry) (ImportSpec, error) {
	s := ImportSpec{Entry: e}
	if why, ok := unsupported[e.Type]; ok {
		return s, fmt.Errorf("cache import of type %s: %s", e.Type, why)
	}
	var err error
	for _, name := range slices.Sorted(maps.Keys(e.Attrs)) {
		value := e.Attrs[name]
		switch e.Type + " " + name {
		case "registry ref":
			s.Ref, err = fullRef(value)
		case "registry registry.insecure":
			s.Insecure, err = strconv.ParseBool(value)
		case "local src":
			s.Dir = value
		case "local digest":
			s.Digest = digest.Digest(value)
			err = s.Digest.Validate()
		case "local tag":
			// The client has found the digest by it.
		default:
			err = errors.New("not supported")
		}
		if err != nil {
			return s, fmt.Errorf("cache import of type %s: attribute %s=%s: %w", e.Type, name, value, err)
		}
	}
	switch {
	case e.Type == TypeRegistry && s.Ref == "":
		return s, errors.New("cache import of type registry needs ref=")
	case e.Type == TypeLocal && s.Dir == "":
		return s, errors.New("cache import of type local needs src=")
	case e.Type != TypeRegistry && e.Type != TypeLocal:
		return s, fmt.Errorf("cache import of type %s is not supported", e.Type)
	}
	return s, nil
}

// ParseImports checks entries of a client's request.
func ParseImports(entries []Entry) ([]ImportSpec, error) {
	var specs []ImportSpec
	for _, e := range entries {
		spec, err := ParseImport(e)
		if err != nil {
			return nil, err
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

// ParseExport checks an entry of a client's request.
func ParseExport(e Entry) (ExportSpec, error) {
	s := ExportSpec{Entry: e, Compression: layerblob.Compression{Kind: compress.Gzip}}
	if why, ok := unsupported[e.Type]; ok {
		return s, fmt.Errorf("cache export of type %s: %s", e.Type, why)
	}
	for _, name := range slices.Sorted(maps.Keys(e.Attrs)) {
		if err := s.set(name, e.Attrs[name]); err != nil {
			return s, fmt.Errorf("cache export of type %s: attribute %s=%s: %w", e.Type, name, e.Attrs[name], err)
		}
	}
	if err := s.Compression.Check(false); err != nil {
		return s, fmt.Errorf("cache export of type %s: %w", e.Type, err)
	}
	switch {
	case e.Type == TypeRegistry && s.Ref == "":
		return s, errors.New("cache export of type registry needs ref=")
	case e.Type == TypeLocal && s.Dir == "":
		return s, errors.New("cache export of type local needs dest=")
	case e.Type != TypeRegistry && e.Type != TypeLocal && e.Type != TypeInline:
		return s, fmt.Errorf("cache export of type %s is not supported", e.Type)
	}
	return s, nil
}

func (s *ExportSpec) set(name, value string) (err error) {
	if s.Type != TypeInline {
		if name == "compression" && value == layerblob.Estargz {
			return errors.New("not supported for caches: want uncompressed, gzip or zstd")
		}
		if ok, err := s.Compression.Set(name, value); ok {
			return err
		}
	}
	switch name {
	case "mode":
		switch value {
		case "min":
		case "max":
			s.Max = true
			if s.Type == TypeInline {
				return errors.New("not supported: an image has the layers of its result only")
			}
		default:
			err = errors.New("want min or max")
		}
		return err
	case "ignore-error":
		s.IgnoreError, err = strconv.ParseBool(value)
		return err
	case "on-failure":
		s.OnFailure, err = strconv.ParseBool(value)
		if err == nil && s.OnFailure && s.Type == TypeInline {
			return errors.New("not supported: a build that fails has no image")
		}
		return err
	case "oci-mediatypes", "image-manifest":
		yes, err := strconv.ParseBool(value)
		if err == nil && !yes {
			return errors.New("not supported: a cache is an OCI image manifest")
		}
		return err
	}
	switch s.Type + " " + name {
	case "registry ref":
		s.Ref, err = fullRef(value)
	case "registry registry.insecure":
		s.Insecure, err = strconv.ParseBool(value)
	case "local dest":
		s.Dir = value
	case "local tag", "local reset":
		// The client's business.
	default:
		err = errors.New("not supported")
	}
	return err
}

func fullRef(ref string) (string, error) {
	named, err := registry.Parse(ref)
	if err != nil {
		return "", err
	}
	return named.String(), nil
}
