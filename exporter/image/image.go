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
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
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
	// LayerBlobs makes eStargz layers and compresses the layers of images with attestations; nil means one of the exporter's own.
	LayerBlobs *layerblob.Maker
	// Pusher is for push=true.
	Pusher *registry.Pusher
}

// New returns the factory for the type "image".
func New(deps Deps) exporter.Factory {
	if deps.LayerBlobs == nil {
		deps.LayerBlobs = layerblob.New(layerblob.Deps{Layers: deps.Layers, Blobs: deps.Blobs, Records: deps.Records})
	}
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
	if e.attrs.noInline {
		r = r.WithoutInlineOnly()
	}
	r, err = e.shaper().Apply(ctx, r, e.attrs.reshape, e.attrs.compression, func(platformID string) (*time.Time, error) {
		return Epoch(r, platformID, e.attrs.epoch, e.attrs.epochSet)
	}, opts)
	if err != nil {
		return nil, fmt.Errorf("export image: %w", err)
	}
	target, err := e.assemble(ctx, r, names, opts)
	if err != nil {
		return nil, err
	}
	told := target
	target.Platform, target.Annotations = nil, nil // of the descriptor that the client is told; the store finds the platform in the config
	img, err := e.store(ctx, names, target, opts)
	if err != nil {
		return nil, err
	}
	desc := target
	if e.attrs.push {
		if desc, err = e.push(ctx, img, names, opts); err != nil {
			return nil, err
		}
	}
	desc.Platform, desc.Annotations = told.Platform, told.Annotations
	return e.response(img, desc, e.given(r))
}

// push sends the image to all registries at once, and to one registry under one name after the other: the second finds
// everything there.
func (e *imageExporter) push(ctx context.Context, img image.Image, names []string, opts exporter.Options) (ocispec.Descriptor, error) {
	byHost, err := e.destinations(names)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var mu sync.Mutex // guards pushed
	var pushed ocispec.Descriptor
	group, gctx := errgroup.WithContext(ctx)
	for _, destinations := range byHost {
		group.Go(func() error {
			for _, to := range destinations {
				o := e.pushOptions(opts)
				o.ByDigest = to.byDigest
				desc, err := e.deps.Pusher.Push(gctx, img, to.name, o)
				if err != nil {
					return err
				}
				opts.Step(fmt.Sprintf("pushing manifest for %s@%s", to.name, desc.Digest))() // the digest by which others find it
				mu.Lock()
				pushed = desc // all get the same manifest
				mu.Unlock()
			}
			return nil
		})
	}
	return pushed, group.Wait()
}

// destination is a place in a registry.
type destination struct {
	name     string
	byDigest bool
}

// destinations are where the image goes, by registry.
func (e *imageExporter) destinations(names []string) (map[string][]destination, error) {
	byHost := map[string][]destination{}
	add := func(name string, byDigest bool) error {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return err
		}
		if byDigest {
			name = named.Name()
		}
		host := reference.Domain(named)
		byHost[host] = append(byHost[host], destination{name, byDigest})
		return nil
	}
	for _, name := range names {
		if err := add(name, e.attrs.byDigest); err != nil {
			return nil, err
		}
	}
	if name := e.danglingName(names); name != "" {
		if err := add(name, true); err != nil {
			return nil, err
		}
	}
	return byHost, nil
}

func (e *imageExporter) pushOptions(opts exporter.Options) registry.Options {
	return registry.Options{
		Credentials: opts.Credentials,
		Tokens:      opts.Tokens,
		Progress:    opts.Transfer("pushing"),
		Compression: e.attrs.compression.Shaped(),
		Insecure:    e.attrs.insecure,
	}
}

func (e *imageExporter) shaper() reshape.Shaper {
	return reshape.Shaper{Layers: e.deps.Layers, Records: e.deps.Records, Blobs: e.deps.LayerBlobs}
}

var (
	_ exporter.Eager   = (*imageExporter)(nil)
	_ exporter.Private = (*imageExporter)(nil)
)

// Private implements exporter.Private: an image that stays here names the tars of its layers.
func (e *imageExporter) Private() bool { return !e.attrs.push }

// Begin implements exporter.Eager: a layer is packed, and sent to the registries when it is to be pushed, while later steps run. Nothing
// gets a name by that.
func (e *imageExporter) Begin(ctx context.Context, r exporter.Result, opts exporter.Options) (*exporter.Early, error) {
	names, err := e.names(r)
	if err != nil {
		return nil, err
	}
	byHost, err := e.destinations(names)
	if err != nil {
		return nil, err
	}
	shaper, push := e.shaper(), e.pushOptions(opts)
	return exporter.NewEarly(ctx, func(ctx context.Context, ref exporter.Ref, snap snapshot.Snapshot, i int) error {
		latest, err := Epoch(r, ref.ID, e.attrs.epoch, e.attrs.epochSet)
		if err != nil {
			return err
		}
		id, ok, err := shaper.Layer(ctx, ref, snap, i, e.attrs.reshape, e.attrs.compression, latest)
		if err != nil || !ok {
			return err
		}
		switch {
		case e.attrs.blobs():
			_, err := e.compress(ctx, id)
			return err
		case !e.attrs.push:
			_, err := e.deps.Layers.Pack(ctx, id)
			return err
		}
		group, gctx := errgroup.WithContext(ctx)
		for _, destinations := range byHost {
			group.Go(func() error {
				for _, to := range destinations {
					if err := e.deps.Pusher.PushLayer(gctx, id, to.name, push); err != nil {
						return err
					}
				}
				return nil
			})
		}
		return group.Wait()
	}), nil
}

// danglingName is the name that the image gets with its digest only, "" for none.
func (e *imageExporter) danglingName(names []string) string {
	if e.attrs.danglingOnly && len(names) > 0 {
		return ""
	}
	return e.attrs.dangling
}

// names are those that the image gets, in their full form.
func (e *imageExporter) names(r exporter.Result) ([]string, error) {
	names, err := Names(e.attrs.names, r)
	if err == nil && e.attrs.push && len(names) == 0 && e.attrs.dangling == "" {
		return nil, fmt.Errorf("push needs a name, and the build did not give the image one")
	}
	return names, err
}

// assemble packs the layers, makes the image of them and notes the snapshots that it runs from.
func (e *imageExporter) assemble(ctx context.Context, r exporter.Result, names []string, opts exporter.Options) (ocispec.Descriptor, error) {
	done := opts.Step("exporting layers")
	layers := make([][]Layer, len(r.Refs))
	pack := e.pack
	if r.Attested() || e.attrs.blobs() {
		pack = e.compress
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, ref := range r.Refs {
		if !e.attrs.push && e.attrs.store { // it is going to be run
			if err := e.deps.Layers.Materialise(ctx, ref.Snapshot...); err != nil {
				return ocispec.Descriptor{}, err
			}
		}
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
	return made.Target, nil
}

// pack returns a layer as its tar. Of an image that is pushed, one that is in a registry, and not here, is the blob that it is
// there, and one that has no tar yet is compressed while that is written.
func (e *imageExporter) pack(ctx context.Context, id layer.ID) (Layer, error) {
	if e.attrs.push {
		if b, ok, err := e.deps.LayerBlobs.Remote(ctx, id, e.attrs.compression.Shaped()); err != nil || ok {
			return Layer{b.Desc, b.DiffID}, err
		}
		if info, err := e.deps.Layers.Stat(ctx, id); err == nil && info.DiffID == "" {
			if _, err := e.compress(ctx, id); err != nil {
				return Layer{}, err
			}
		}
	}
	info, err := e.deps.Layers.Pack(ctx, id)
	if err != nil {
		return Layer{}, fmt.Errorf("pack layer %s: %w", id, err)
	}
	desc := ocispec.Descriptor{MediaType: compress.MediaType(compress.None, false), Digest: info.DiffID, Size: info.TarSize}
	return Layer{desc, info.DiffID}, nil
}

// compress returns a layer as the blob that a push sends.
func (e *imageExporter) compress(ctx context.Context, id layer.ID) (Layer, error) {
	b, err := e.deps.LayerBlobs.Layer(ctx, id, e.attrs.compression.Shaped())
	return Layer{b.Desc, b.DiffID}, err
}

// store names target in the local image store, and returns the image with what the store knows about it.
func (e *imageExporter) store(ctx context.Context, names []string, target ocispec.Descriptor, opts exporter.Options) (image.Image, error) {
	names = e.localNames(names, target.Digest)
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

// localNames are the names in the local store. A tag that the registry does not get is none here.
func (e *imageExporter) localNames(names []string, d digest.Digest) []string {
	if !e.attrs.store {
		return nil
	}
	var local []string
	withDigest := func(name string) {
		if named, err := reference.ParseNormalizedNamed(name); err == nil {
			local = append(local, named.Name()+"@"+d.String())
		}
	}
	for _, name := range names {
		if e.attrs.push && e.attrs.byDigest {
			continue // gets a name when its digest in the registry is known
		}
		if local = append(local, name); e.attrs.canonical {
			withDigest(name)
		}
	}
	if name := e.danglingName(names); name != "" {
		withDigest(name)
	}
	slices.Sort(local)
	return slices.Compact(local)
}

// given are the names that the image gets, as the client and the frontend have written them.
func (e *imageExporter) given(r exporter.Result) []string {
	var names []string
	for _, name := range e.attrs.names {
		if name == "*" {
			name = string(r.Metadata[exptypes.ExporterImageNameKey])
		}
		if name != "" {
			names = append(names, name)
		}
	}
	return names
}

// response is what BuildKit's clients look for; names are as they were given.
func (e *imageExporter) response(img image.Image, desc ocispec.Descriptor, names []string) (map[string]string, error) {
	resp := map[string]string{exptypes.ExporterImageDigestKey: desc.Digest.String()}
	named := slices.Clone(names)
	if name := e.danglingName(names); name != "" {
		named = append(named, name+"@"+desc.Digest.String())
	}
	if len(named) > 0 {
		resp[exptypes.ExporterImageNameKey] = strings.Join(named, ",")
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
