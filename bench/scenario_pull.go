// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/compress"
)

// The image that is pulled: layers of files with words and random bytes.
const (
	pullLayers = 10
	pullFiles  = 320 // of a layer
	pullFile   = 256 << 10
)

var (
	pullGzip = pulling(compress.Gzip)
	pullZstd = pulling(compress.Zstd)
)

func pulling(kind compress.Kind) *scenario {
	faster := 2.0
	if kind == compress.Zstd {
		faster = 2.5
	}
	return &scenario{
		goal:  faster,
		goals: []goal{withinFloor(1.3), peakMemory},
		name:  "pull-10x80MB-" + string(kind),
		about: fmt.Sprintf("A build of FROM an image of %d layers of 80 MB (%s) in a registry on loopback, and RUN true, with an empty cache.",
			pullLayers, kind),
		floorAbout: "every blob fetched, uncompressed, hashed (SHA-256 of the tar) and written to a file that is synced, on all processors; and no RUN",
		prepare: func(ctx context.Context, b *bench) error {
			image, err := b.pulledImage(kind)
			if err != nil {
				return err
			}
			if b.registry, err = serveImage(ctx, image); err != nil {
				return err
			}
			b.pulled = image
			return b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
				"Dockerfile": "FROM " + b.registry + "/pulled:1\nRUN true\n",
			})
		},
		floor: func(ctx context.Context, b *bench) error { return b.pullFloor(ctx) },
		contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
			if _, ok := p.(archiver); !ok { // buildah is told to pull nothing
				return nil, nil
			}
			return coldBuildingOf(func(b *bench) build { return build{dir: filepath.Join(b.dir, "context")} })(ctx, b, p)
		},
	}
}

// servedImage is an image in a directory of blobs.
type servedImage struct {
	dir      string
	manifest ocispec.Descriptor
	layers   []ocispec.Descriptor
}

func (i *servedImage) path(d digest.Digest) string { return filepath.Join(i.dir, d.Encoded()) }

// pulledImage makes the image.
func (b *bench) pulledImage(kind compress.Kind) (*servedImage, error) {
	image := &servedImage{dir: filepath.Join(b.dir, "registry-"+string(kind))}
	if err := os.MkdirAll(image.dir, 0o700); err != nil {
		return nil, err
	}
	config := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: make([]digest.Digest, pullLayers)},
		Config:   ocispec.ImageConfig{Env: []string{"PATH=/bin"}},
	}
	image.layers = make([]ocispec.Descriptor, pullLayers)
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for n := range pullLayers {
		group.Go(func() (err error) {
			image.layers[n], config.RootFS.DiffIDs[n], err = b.pulledLayer(image, n, kind)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	configDesc, err := image.document(ocispec.MediaTypeImageConfig, config)
	if err != nil {
		return nil, err
	}
	image.manifest, err = image.document(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: configDesc, Layers: image.layers,
	})
	return image, err
}

func (i *servedImage) document(mediaType string, v any) (ocispec.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	return d, os.WriteFile(i.path(d.Digest), raw, 0o600)
}

// pulledLayer makes the n-th layer; the first one has a shell.
func (b *bench) pulledLayer(image *servedImage, n int, kind compress.Kind) (ocispec.Descriptor, digest.Digest, error) {
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	add := func(h *tar.Header, content []byte) error {
		h.Size, h.ModTime = int64(len(content)), inputTime
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	if n == 0 {
		path, err := busybox()
		if err != nil {
			return ocispec.Descriptor{}, "", err
		}
		box, err := os.ReadFile(path)
		if err != nil {
			return ocispec.Descriptor{}, "", err
		}
		err = errors.Join(
			add(&tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil), add(&tar.Header{Name: "bin/busybox", Mode: 0o755}, box),
			add(&tar.Header{Name: "bin/sh", Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil),
			add(&tar.Header{Name: "bin/true", Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil),
		)
		if err != nil {
			return ocispec.Descriptor{}, "", err
		}
	}
	dir := fmt.Sprintf("layer%d/", n)
	if err := add(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	source := b.random(fmt.Sprint("pulled layer ", n))
	content := make([]byte, pullFile)
	for i := range pullFiles {
		mixed(source, content)
		if err := add(&tar.Header{Name: fmt.Sprintf("%sfile%d", dir, i), Mode: 0o644}, content); err != nil {
			return ocispec.Descriptor{}, "", err
		}
	}
	if err := w.Close(); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	diffID := digest.FromBytes(raw.Bytes())
	var packed bytes.Buffer
	_, _, level := compress.Levels(kind)
	if err := compress.Write(context.Background(), &packed, &raw, kind, level); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	d := ocispec.Descriptor{MediaType: compress.MediaType(kind, false), Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len())}
	return d, diffID, os.WriteFile(image.path(d.Digest), packed.Bytes(), 0o600)
}

// mixed fills b: a quarter with random bytes, the rest with words, as code and libraries together are about.
func mixed(source *rand.ChaCha8, b []byte) {
	_, _ = source.Read(b)
	for i := len(b) / 4; i+8 <= len(b); i += 8 {
		word := binary.LittleEndian.Uint64(b[i:]) % 5000
		copy(b[i:i+8], fmt.Sprintf("%07x ", word*word*2654435761%0xfffffff))
	}
}

// serveImage is a registry with one image, "pulled:1", until ctx ends. It returns its host.
func serveImage(ctx context.Context, image *servedImage) (string, error) {
	listener, err := listenCounted()
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, "/v2/pulled/")
		what, ref, _ := strings.Cut(name, "/")
		d := digest.Digest(ref)
		switch {
		case r.URL.Path == "/v2/":
			return
		case ok && what == "manifests" && (ref == "1" || d == image.manifest.Digest):
			d = image.manifest.Digest
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		case ok && what == "blobs" && d.Validate() == nil:
			w.Header().Set("Content-Type", "application/octet-stream")
		default:
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Docker-Content-Digest", d.String())
		http.ServeFile(w, r, image.path(d))
	})}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() { _ = server.Serve(listener) }()
	return listener.Addr().String(), nil
}

// pullFloor does what every pull must do.
func (b *bench) pullFloor(ctx context.Context) error {
	to := filepath.Join(b.dir, "floor")
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for n, l := range b.pulled.layers {
		group.Go(func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.registry+"/v2/pulled/blobs/"+l.Digest.String(), nil)
			if err != nil {
				return err
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			plain, _, err := compress.NewReader(resp.Body)
			if err != nil {
				return err
			}
			defer plain.Close()
			out, err := os.Create(filepath.Join(to, fmt.Sprint(n)))
			if err != nil {
				return err
			}
			defer out.Close()
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(out, sha256.New())}, struct{ io.Reader }{plain}, make([]byte, 256<<10)); err != nil {
				return err
			}
			return out.Sync()
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return b.moveAway(to)
}
