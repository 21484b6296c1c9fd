// SPDX-License-Identifier: Apache-2.0

// Package blob is the source of single files that are kept as blobs, under their digest: in a registry or in an OCI layout of the
// client (llb.ImageBlob, llb.OCILayoutBlob). The digest in the name is what the file must have, so nobody is asked before
// the file is needed, and nobody at all when the blob store has it.
package blob

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// The schemes of the identifiers, SCHEME://NAME@DIGEST.
const (
	RegistryScheme = "docker-image+blob"
	LayoutScheme   = "oci-layout+blob"
)

// readAhead is how much is asked for at once of a client: one call each, in bytes.
const readAhead = 4 << 20

// Deps is what the source works with.
type Deps struct {
	Layers *layer.Store
	Blobs  *blob.Store
	// Registry returns the registry client with the credentials of env's client.
	Registry func(env *solver.Env) *registry.Registry
}

// New returns the function that makes sources of vertices, of either scheme.
func New(deps Deps) func(*solver.Vertex) (solver.Source, error) {
	return func(v *solver.Vertex) (solver.Source, error) {
		op := v.Op.GetSource()
		scheme, ref, _ := strings.Cut(op.GetIdentifier(), "://")
		s := &source{deps: deps, id: op.GetIdentifier(), ref: ref, inLayout: scheme == LayoutScheme, perm: 0o600}
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			return nil, fmt.Errorf("source %s: %w", s.id, err)
		}
		digested, ok := named.(reference.Digested)
		if !ok {
			return nil, fmt.Errorf("source %s: has no digest: a blob is named NAME@DIGEST", s.id)
		}
		if _, ok := named.(reference.Tagged); ok {
			return nil, fmt.Errorf("source %s: has a tag: a blob is named NAME@DIGEST", s.id)
		}
		s.digest = digested.Digest()
		for _, key := range slices.Sorted(maps.Keys(op.Attrs)) {
			if err := s.attr(key, op.Attrs[key]); err != nil {
				return nil, fmt.Errorf("source %s: attribute %s: %w", s.id, key, err)
			}
		}
		if s.inLayout && s.store == "" {
			return nil, fmt.Errorf("source %s: says not which layout is meant (attribute %s)", s.id, pb.AttrOCILayoutStoreID)
		}
		return s, nil
	}
}

// source is the op of one vertex.
type source struct {
	deps     Deps
	id, ref  string
	digest   digest.Digest
	inLayout bool
	session  string // of the client that has the layout; "": the build's own
	store    string // the layout's name at the client
	filename string
	perm     uint32
	uid, gid uint32
}

var _ solver.Source = (*source)(nil)

func (s *source) attr(key, value string) error {
	number := func(to *uint32, limit uint64) error {
		n, err := strconv.ParseUint(value, 0, 32)
		if err != nil || n > limit {
			return fmt.Errorf("invalid number %q", value)
		}
		*to = uint32(n)
		return nil
	}
	switch {
	case key == pb.AttrHTTPFilename:
		s.filename = value
	case key == pb.AttrHTTPPerm:
		if err := number(&s.perm, 0o7777); err != nil {
			return err
		}
		if s.perm == 0 {
			s.perm = 0o600
		}
	case key == pb.AttrHTTPUID:
		return number(&s.uid, 1<<32-2)
	case key == pb.AttrHTTPGID:
		return number(&s.gid, 1<<32-2)
	case key == pb.AttrImageRecordType:
		switch value {
		case "", "regular", "internal", "frontend":
			// How "du" shows the record: nothing that a build could notice.
		default:
			return fmt.Errorf("invalid record type %q", value)
		}
	case key == pb.AttrOCILayoutSessionID && s.inLayout:
		s.session = value
	case key == pb.AttrOCILayoutStoreID && s.inLayout:
		s.store = value
	default:
		return fmt.Errorf("not supported yet: %s", value)
	}
	return nil
}

// name is the name of the file: what was asked for as far as it can be a file's name, or the digest in hex.
func (s *source) name() string {
	if s.filename == "" {
		return s.digest.Encoded()
	}
	name := path.Base(strings.TrimSpace(s.filename))
	if name == "." || name == ".." || name == "/" || strings.ContainsFunc(name, unicode.IsControl) {
		return "download"
	}
	return name
}

// Parts implements solver.Op. Where the blob is kept does not matter.
func (s *source) Parts() []record.Part {
	return []record.Part{
		{Name: "source", Value: "blob"},
		{Name: "name", Value: s.name()},
		{Name: "owner", Value: fmt.Sprintf("%d:%d", s.uid, s.gid)},
		{Name: "mode", Value: fmt.Sprintf("%#o", s.perm)},
	}
}

// InputDigest implements solver.Op. A source has no inputs.
func (s *source) InputDigest(context.Context, *solver.Env, int, snapshot.Snapshot) (digest.Digest, error) {
	return "", fmt.Errorf("%s: a source has no inputs", s.id)
}

// Pin implements solver.Source. The digest is in the name.
func (s *source) Pin(context.Context, *solver.Env) (solver.Pin, error) {
	return solver.Pin{Parts: []record.Part{{Name: "digest", Value: s.digest.String()}}, Resolved: s.digest.String()}, nil
}

// Run implements solver.Op: it makes a snapshot with the file.
func (s *source) Run(ctx context.Context, env *solver.Env, _ []snapshot.Snapshot) ([]snapshot.Snapshot, error) {
	content, sum, err := s.fetched(ctx, env)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", s.id, err)
	}
	draft := s.deps.Layers.NewDraft(nil)
	draft.Put(index.Entry{
		Path: s.name(), Type: index.File, Mode: s.perm, UID: s.uid, GID: s.gid, Size: content, Digest: sum, Offset: -1,
	}, func() (io.ReadCloser, error) {
		b, err := s.deps.Blobs.Open(s.digest)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.NewSectionReader(b, 0, b.Size()), b}, nil
	})
	id, err := draft.Commit(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.id, err)
	}
	return []snapshot.Snapshot{{id}}, nil
}

// fetched makes sure that the blob is in the store, and returns its size and the digest by which layers know files.
func (s *source) fetched(ctx context.Context, env *solver.Env) (size int64, sum digest.Digest, err error) {
	if s.deps.Blobs.Has(s.digest) {
		// Read once, verified, before it is believed; a damaged one is gone after that, and is fetched again.
		if size, sum, err = s.check(); err == nil || !errors.Is(err, blob.ErrDigest) {
			return size, sum, err
		}
	}
	from, size, err := s.open(ctx, env)
	if err != nil {
		return 0, "", err
	}
	defer from.Close()
	status := "downloading " + s.digest.String()
	r := &counted{r: from, report: func(n int64) { env.Progress.Status(status, n, size, false) }}
	err = s.deps.Blobs.Put(ctx, r, ocispec.Descriptor{Digest: s.digest, Size: size})
	env.Progress.Status(status, r.n, size, true)
	if err != nil {
		return 0, "", err
	}
	return s.check()
}

// check reads the blob of the store.
func (s *source) check() (int64, digest.Digest, error) {
	b, err := s.deps.Blobs.Open(s.digest)
	if err != nil {
		return 0, "", err
	}
	defer b.Close()
	sum := digest.SHA256.Digester()
	n, err := io.Copy(sum.Hash(), b)
	if err != nil {
		return 0, "", err
	}
	return n, sum.Digest(), nil
}

// open asks who has the blob.
func (s *source) open(ctx context.Context, env *solver.Env) (io.ReadCloser, int64, error) {
	if !s.inLayout {
		return s.deps.Registry(env).FetchDigest(ctx, s.ref, s.digest)
	}
	b, err := solver.OpenLayoutBlob(ctx, env.Session, s.session, s.store, s.digest)
	if err != nil {
		return nil, 0, err
	}
	return struct {
		io.Reader
		io.Closer
	}{bufio.NewReaderSize(io.NewSectionReader(b, 0, b.Size()), readAhead), b}, b.Size(), nil
}

// counted reports how many bytes have been read, every MiB.
type counted struct {
	r       io.Reader
	n, told int64
	report  func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 1<<20 {
		c.told = c.n
		c.report(c.n)
	}
	return n, err
}
