// SPDX-License-Identifier: Apache-2.0

// Package remotecache is what builds do with shared caches (cache/share): it reads the options of clients, opens the places, answers the
// solver's questions from what is imported, and exports what a build has made and found.
package remotecache

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/share/s3"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// The types of places.
const (
	TypeRegistry = "registry"
	TypeLocal    = "local"
	TypeS3       = "s3"
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
	case TypeS3:
		return "bucket " + e.Attrs["bucket"] + ", " + e.Attrs["prefix"] + s3Name(e.Attrs)
	}
	return e.Type
}

// s3Name is the name of the document in a bucket.
func s3Name(attrs map[string]string) string { return cmp.Or(attrs["name"], "main") }

// key tells entries apart. It is shown to nobody, but hashed where it is.
func (e Entry) key() string {
	var b strings.Builder
	b.WriteString(e.Type)
	for _, name := range slices.Sorted(maps.Keys(e.Attrs)) {
		if slices.Contains(s3.Secrets, name) {
			continue
		}
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
	// Bucket is one of S3, and Name that of the document in it.
	Bucket s3.Options
	Name   string
}

// ExportSpec is a checked place to export to.
type ExportSpec struct {
	Entry
	Ref      string
	Insecure bool
	Dir      string
	Bucket   s3.Options
	Name     string
	// Mounts are the names of cache mounts to be exported, or the one that means all; MountsMaxSize is how many bytes of each, 0 for no limit.
	Mounts        []string
	MountsMaxSize int64
	// Chunked sends large layers in chunks.
	Chunked bool
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
	bucket, taken, err := bucketOf(e)
	if err != nil {
		return s, fmt.Errorf("cache import of type %s: %w", e.Type, err)
	}
	s.Bucket, s.Name = bucket, s3Name(e.Attrs)
	for _, name := range slices.Sorted(maps.Keys(e.Attrs)) {
		value := e.Attrs[name]
		if slices.Contains(taken, name) {
			continue
		}
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
	case e.Type != TypeRegistry && e.Type != TypeLocal && e.Type != TypeS3:
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

// ParseExports checks entries of a client's request.
func ParseExports(entries []Entry) ([]ExportSpec, error) {
	var specs []ExportSpec
	local := 0
	for _, e := range entries {
		spec, err := ParseExport(e)
		if err != nil {
			return nil, err
		}
		specs = append(specs, spec)
		if spec.Type == TypeLocal {
			local++
		}
	}
	if local > 1 {
		return nil, errors.New("cache export: two caches of type=local in one build are not supported: BuildKit's protocol gives all directories of a client " +
			"the tag of the same manifest; export to one, and copy it or build again for the other")
	}
	return specs, nil
}

// ParseExport checks an entry of a client's request.
func ParseExport(e Entry) (ExportSpec, error) {
	s := ExportSpec{Entry: e, Compression: layerblob.Compression{Kind: compress.Gzip}}
	if why, ok := unsupported[e.Type]; ok {
		return s, fmt.Errorf("cache export of type %s: %s", e.Type, why)
	}
	bucket, taken, err := bucketOf(e)
	if err != nil {
		return s, fmt.Errorf("cache export of type %s: %w", e.Type, err)
	}
	s.Bucket, s.Name = bucket, s3Name(e.Attrs)
	for _, name := range slices.Sorted(maps.Keys(e.Attrs)) {
		if slices.Contains(taken, name) {
			continue
		}
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
	case s.MountsMaxSize > 0 && len(s.Mounts) == 0:
		return s, errors.New("cache export: mounts-max-size says how much of each cache mount is exported: say which with mounts=")
	case s.Chunked && (e.Attrs["compression"] != "" || e.Attrs["compression-level"] != "" || e.Attrs["force-compression"] != ""):
		return s, errors.New("cache export: chunked=true and compression exclude each other: chunks are compressed with zstd")
	case e.Type != TypeRegistry && e.Type != TypeLocal && e.Type != TypeInline && e.Type != TypeS3:
		return s, fmt.Errorf("cache export of type %s is not supported", e.Type)
	}
	return s, nil
}

// bucketOf reads the attributes that are about a bucket and names them. Secrets are not in its errors.
func bucketOf(e Entry) (s3.Options, []string, error) {
	if e.Type != TypeS3 {
		return s3.Options{}, nil, nil
	}
	o, taken, err := s3.ParseOptions(e.Attrs)
	if err != nil {
		return o, nil, err
	}
	if strings.Contains(e.Attrs["name"], ";") {
		return o, nil, fmt.Errorf("name=%s: several names are not supported: say --cache-to or --cache-from once for each", e.Attrs["name"])
	}
	return o, append(taken, "name"), o.Check()
}

func (s *ExportSpec) set(name, value string) (err error) {
	if s.Type != TypeInline {
		if name == "compression" && !slices.Contains([]string{"uncompressed", "gzip", "zstd"}, value) {
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
	case "mounts":
		if s.Type == TypeInline {
			return errors.New("not supported: an image does not carry cache mounts")
		}
		if s.Mounts = strings.Split(value, ","); slices.Contains(s.Mounts, "") {
			return errors.New("want the IDs of cache mounts, or all")
		}
		return nil
	case "mounts-max-size":
		s.MountsMaxSize, err = units.RAMInBytes(value)
		if err == nil && s.MountsMaxSize <= 0 {
			err = errors.New("want a size such as 2GB")
		}
		return err
	case "chunked":
		s.Chunked, err = strconv.ParseBool(value)
		if err == nil && s.Chunked && s.Type == TypeInline {
			return errors.New("not supported: an image has its layers as they are")
		}
		return err
	case "oci-mediatypes", "image-manifest":
		if s.Type == TypeS3 {
			return errors.New("not supported: there are no manifests in a bucket")
		}
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
