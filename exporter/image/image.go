// SPDX-License-Identifier: Apache-2.0

// Package image exports results as images: into the local image store, and on request to registries.
//
// An image that comes with attestations is the exception: they name the digest of its manifest, so that is made as it will be pushed, with
// compressed layers.
//
// Otherwise nothing is compressed and no layer is copied for the local store: an image there is a manifest that names the
// uncompressed tars of its layers by their diff IDs, a config, and the snapshot that it runs from. A push compresses, in
// exporter/registry. The same result exported again is the same image, to the byte: what has no time of its own
// gets the time of its first export.
package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	"github.com/seed-68981b69/slipway/exporter/registry"
	"github.com/seed-68981b69/slipway/exporter/reshape"
)

// Deps is what exports work with.
type Deps struct {
	Layers  *layer.Store
	Blobs   *blob.Store
	Images  *image.Store
	Records *record.Store
	// LayerBlobs compresses the layers of images with attestations; nil means that there are none.
	LayerBlobs *layerblob.Maker
	// Pusher is for push=true.
	Pusher *registry.Pusher
}

// New returns the factory for the type "image".
func New(deps Deps) exporter.Factory {
	return func(given map[string]string) (exporter.Exporter, error) {
		a, err := parseAttrs(given)
		if err != nil {
			return nil, err
		}
		return &imageExporter{deps: deps, attrs: a}, nil
	}
}

type imageExporter struct {
	deps  Deps
	attrs attrs
}

func (e *imageExporter) Name() string { return "exporting to image" }

// Export implements exporter.Exporter: pack, assemble, name, push.
func (e *imageExporter) Export(ctx context.Context, r exporter.Result, opts exporter.Options) (map[string]string, error) {
	names, err := e.names(r)
	if err != nil {
		return nil, err
	}
	shaper := reshape.Shaper{Layers: e.deps.Layers, Records: e.deps.Records}
	r, err = shaper.Apply(ctx, r, e.attrs.reshape, func(platformID string) (*time.Time, error) {
		return Epoch(r, platformID, e.attrs.epoch, e.attrs.epochSet)
	}, opts)
	if err != nil {
		return nil, fmt.Errorf("export image: %w", err)
	}
	target, err := e.assemble(ctx, r, names, opts)
	if err != nil {
		return nil, err
	}
	img, err := e.store(ctx, names, target, opts)
	if err != nil {
		return nil, err
	}
	desc := target
	if e.attrs.push {
		for _, name := range names {
			// All names get the same manifest; the second push finds everything there.
			desc, err = e.deps.Pusher.Push(ctx, img, name, registry.Options{
				Credentials: opts.Credentials,
				Progress:    opts.Transfer("pushing"),
			})
			if err != nil {
				return nil, err
			}
			opts.Step(fmt.Sprintf("pushing manifest for %s@%s", name, desc.Digest))() // the digest by which others find it
		}
	}
	return e.response(img, desc, names)
}

// names are those that the image gets, in their full form.
func (e *imageExporter) names(r exporter.Result) ([]string, error) {
	names, err := Names(e.attrs.names, r)
	if err == nil && e.attrs.push && len(names) == 0 {
		return nil, fmt.Errorf("push needs a name, and the build did not give the image one")
	}
	return names, err
}

// assemble packs the layers, makes the image of them and notes the snapshots that it runs from.
func (e *imageExporter) assemble(ctx context.Context, r exporter.Result, names []string, opts exporter.Options) (ocispec.Descriptor, error) {
	done := opts.Step("exporting layers")
	layers := make([][]Layer, len(r.Refs))
	pack := e.pack
	if r.Attested() {
		if e.deps.LayerBlobs == nil {
			return ocispec.Descriptor{}, fmt.Errorf("export image: attestations are not supported here")
		}
		pack = e.compress
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, ref := range r.Refs {
		layers[i] = make([]Layer, len(ref.Snapshot))
		for j, id := range ref.Snapshot {
			group.Go(func() (err error) {
				layers[i][j], err = pack(gctx, id)
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, err
	}
	done()
	assembler := Assembler{
		Blobs: e.deps.Blobs, Records: e.deps.Records,
		Docker: e.attrs.docker, Annotations: e.attrs.annotations, Epoch: e.attrs.epoch, EpochSet: e.attrs.epochSet,
		Names: names, NoArtifact: e.attrs.artifact != nil && !*e.attrs.artifact, Layers: e.deps.Layers,
	}
	made, err := assembler.Assemble(ctx, r, layers, opts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for i, m := range made.Manifests {
		// Before the image has a name, so that it is never seen without its layers.
		if err := e.deps.Images.SetLayers(ctx, m.Desc.Digest, r.Refs[i].Snapshot); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	made.Target.Annotations = nil // of a descriptor that nothing of ours keeps
	return made.Target, nil
}

// pack returns a layer as its tar.
func (e *imageExporter) pack(ctx context.Context, id layer.ID) (Layer, error) {
	info, err := e.deps.Layers.Pack(ctx, id)
	if err != nil {
		return Layer{}, fmt.Errorf("pack layer %s: %w", id, err)
	}
	desc := ocispec.Descriptor{MediaType: compress.MediaType(compress.None, false), Digest: info.DiffID, Size: info.TarSize}
	return Layer{desc, info.DiffID}, nil
}

// compress returns a layer as the blob that a push sends.
func (e *imageExporter) compress(ctx context.Context, id layer.ID) (Layer, error) {
	b, err := e.deps.LayerBlobs.Layer(ctx, id, layerblob.Compression{Kind: compress.Gzip})
	return Layer{b.Desc, b.DiffID}, err
}

// store names target in the local image store, and returns the image with what the store knows about it.
func (e *imageExporter) store(ctx context.Context, names []string, target ocispec.Descriptor, opts exporter.Options) (image.Image, error) {
	if !e.attrs.store {
		names = nil
	}
	var img image.Image
	var err error
	for _, name := range names {
		done := opts.Step("naming to " + name)
		if img, err = e.deps.Images.Add(ctx, image.Image{Name: name, Target: target}); err != nil {
			return image.Image{}, err
		}
		done()
	}
	switch {
	case len(names) > 0:
		return img, nil
	case e.attrs.store:
		return e.deps.Images.Add(ctx, image.Image{Target: target}) // found by its ID
	}
	return image.Image{Target: target}, nil
}

// response is what BuildKit's clients look for.
func (e *imageExporter) response(img image.Image, desc ocispec.Descriptor, names []string) (map[string]string, error) {
	resp := map[string]string{exptypes.ExporterImageDigestKey: desc.Digest.String()}
	if len(names) > 0 {
		resp[exptypes.ExporterImageNameKey] = strings.Join(names, ",")
	}
	if desc.MediaType == ocispec.MediaTypeImageManifest || desc.MediaType == dockerManifest {
		raw, err := e.deps.Blobs.ReadAll(img.Target.Digest)
		if err != nil {
			return nil, err
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, err
		}
		resp[exptypes.ExporterImageConfigDigestKey] = m.Config.Digest.String()
	}
	raw, err := json.Marshal(desc)
	if err != nil {
		return nil, err
	}
	resp[exptypes.ExporterImageDescriptorKey] = base64.StdEncoding.EncodeToString(raw)
	return resp, nil
}
