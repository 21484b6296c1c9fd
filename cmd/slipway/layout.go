// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	cerrdefs "github.com/containerd/errdefs"
	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const layoutScheme = "oci-layout://"

// addLayout offers an OCI layout to the build as the named context. value is oci-layout://DIR[:TAG][@DIGEST].
func addLayout(solve *bkclient.SolveOpt, name, value string) error {
	l, err := parseLayout(strings.TrimPrefix(value, layoutScheme))
	if err != nil {
		return err
	}
	target, err := l.target()
	if err != nil {
		return err
	}
	if solve.OCIStores == nil {
		solve.OCIStores = map[string]content.Store{}
	}
	store := "layout" + strconv.Itoa(len(solve.OCIStores))
	solve.OCIStores[store] = layoutBlobs(l.dir)
	solve.FrontendAttrs["context:"+name] = layoutScheme + store + "@" + target.String()
	return nil
}

// layoutRef is an image in an OCI layout.
type layoutRef struct {
	dir    string
	tag    string        // "" when none was given
	digest digest.Digest // "" when none was given
}

// parseLayout reads DIR[:TAG][@DIGEST]. A directory may have a colon or an @ in its name.
func parseLayout(spec string) (layoutRef, error) {
	l := layoutRef{dir: spec}
	if i := strings.LastIndex(spec, "@"); i >= 0 {
		if d, err := digest.Parse(spec[i+1:]); err == nil {
			l.dir, l.digest = spec[:i], d
		}
	}
	if i := strings.LastIndex(l.dir, ":"); i >= 0 && checkDir(l.dir) != nil {
		l.dir, l.tag = l.dir[:i], l.dir[i+1:]
	}
	if err := checkDir(l.dir); err != nil {
		return l, fmt.Errorf("OCI layout %s: %w", l.dir, err)
	}
	return l, nil
}

// The annotation in which containerd and BuildKit keep an image's full name in an index.
const containerdName = "io.containerd.image.name"

// target finds the manifest or index that is meant: by its digest, by its tag, "latest" when there is neither, or the only one.
func (l layoutRef) target() (digest.Digest, error) {
	if l.digest != "" {
		return l.digest, nil
	}
	raw, err := os.ReadFile(filepath.Join(l.dir, ocispec.ImageIndexFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s is not an OCI layout: it has no %s", l.dir, ocispec.ImageIndexFile)
	}
	if err != nil {
		return "", fmt.Errorf("OCI layout: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return "", fmt.Errorf("OCI layout %s: %s: %w", l.dir, ocispec.ImageIndexFile, err)
	}
	tag := l.tag
	if tag == "" {
		tag = "latest"
	}
	var tags []string
	for _, m := range index.Manifests {
		name := m.Annotations[ocispec.AnnotationRefName]
		if name == tag || m.Annotations[containerdName] == tag {
			return m.Digest, m.Digest.Validate()
		}
		tags = append(tags, name)
	}
	if l.tag == "" && len(index.Manifests) == 1 {
		d := index.Manifests[0].Digest
		return d, d.Validate()
	}
	slices.Sort(tags)
	return "", fmt.Errorf("OCI layout %s has no image %q (there are: %s)", l.dir, tag, strings.Join(tags, ", "))
}

// layoutBlobs offers the blobs of an OCI layout, read-only, to the engine. Nothing is written into the directory. The engine
// verifies what it gets.
type layoutBlobs string

var _ content.Store = layoutBlobs("")

func (l layoutBlobs) path(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("blob %q: %w: %w", d, err, cerrdefs.ErrInvalidArgument)
	}
	return filepath.Join(string(l), ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), nil
}

// Info implements content.Store.
func (l layoutBlobs) Info(_ context.Context, d digest.Digest) (content.Info, error) {
	path, err := l.path(d)
	if err != nil {
		return content.Info{}, err
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return content.Info{}, fmt.Errorf("OCI layout %s has no blob %s: %w", string(l), d, cerrdefs.ErrNotFound)
	}
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", path) // opening a pipe would wait for ever
	}
	if err != nil {
		return content.Info{}, err
	}
	return content.Info{Digest: d, Size: info.Size(), CreatedAt: info.ModTime(), UpdatedAt: info.ModTime()}, nil
}

// ReaderAt implements content.Store.
func (l layoutBlobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	path, err := l.path(desc.Digest)
	if err != nil {
		return nil, err
	}
	info, err := l.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return struct {
		io.ReaderAt
		io.Closer
		sized
	}{f, f, sized(info.Size)}, nil
}

// sized is how many bytes there are.
type sized int64

// Size implements content.ReaderAt.
func (s sized) Size() int64 { return int64(s) }

// errReadOnly is what the engine hears when it asks for more than reading.
var errReadOnly = fmt.Errorf("an OCI layout that is a build context is read-only: %w", cerrdefs.ErrNotImplemented)

// Update implements content.Store.
func (layoutBlobs) Update(context.Context, content.Info, ...string) (content.Info, error) {
	return content.Info{}, errReadOnly
}

// Walk implements content.Store.
func (layoutBlobs) Walk(context.Context, content.WalkFunc, ...string) error { return errReadOnly }

// Delete implements content.Store.
func (layoutBlobs) Delete(context.Context, digest.Digest) error { return errReadOnly }

// Status implements content.Store.
func (layoutBlobs) Status(context.Context, string) (content.Status, error) {
	return content.Status{}, errReadOnly
}

// ListStatuses implements content.Store.
func (layoutBlobs) ListStatuses(context.Context, ...string) ([]content.Status, error) {
	return nil, errReadOnly
}

// Abort implements content.Store.
func (layoutBlobs) Abort(context.Context, string) error { return errReadOnly }

// Writer implements content.Store.
func (layoutBlobs) Writer(context.Context, ...content.WriterOpt) (content.Writer, error) {
	return nil, errReadOnly
}
