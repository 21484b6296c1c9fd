// SPDX-License-Identifier: Apache-2.0

// Package image exports results as images: into the local image store, and on request to registries.
//
// Nothing is compressed and no layer is copied for the local store: an image there is a manifest that names the
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
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/registry"
)

// Docker's media types.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

// createdBucket of the record database has the time of the first export, under the digest of everything else in a config.
const createdBucket = "image-created"

// Deps is what exports work with.
type Deps struct {
	Layers  *layer.Store
	Blobs   *blob.Store
	Images  *image.Store
	Records *record.Store
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
	target, err := e.assemble(ctx, r, opts)
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
		}
	}
	return e.response(img, desc, names)
}

// names are those that the image gets, in their full form.
func (e *imageExporter) names(r exporter.Result) ([]string, error) {
	var names []string
	for _, name := range e.attrs.names {
		given := []string{name}
		if name == "*" {
			given = strings.Split(string(r.Metadata[exptypes.ExporterImageNameKey]), ",")
		}
		for _, name := range given {
			if name == "" {
				continue
			}
			full, err := image.Normalize(name)
			if err != nil {
				return nil, err
			}
			if !slices.Contains(names, full) {
				names = append(names, full)
			}
		}
	}
	if e.attrs.push && len(names) == 0 {
		return nil, fmt.Errorf("push needs a name, and the build did not give the image one")
	}
	return names, nil
}

// assemble packs the layers and stores the manifests, configs and, for several platforms, the index.
func (e *imageExporter) assemble(ctx context.Context, r exporter.Result, opts exporter.Options) (ocispec.Descriptor, error) {
	if len(r.Refs) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("export image: the build has no result")
	}
	done := opts.Step("exporting layers")
	packed := make([][]packedLayer, len(r.Refs))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, ref := range r.Refs {
		packed[i] = make([]packedLayer, len(ref.Snapshot))
		for j, id := range ref.Snapshot {
			group.Go(func() (err error) {
				packed[i][j], err = e.pack(gctx, id)
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return ocispec.Descriptor{}, err
	}
	done()

	var manifests []ocispec.Descriptor
	for i, ref := range r.Refs {
		desc, err := e.manifest(ctx, r, ref, packed[i], opts)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		manifests = append(manifests, desc)
	}
	if !r.MultiPlatform && len(manifests) == 1 {
		return manifests[0], nil
	}
	mediaType := ocispec.MediaTypeImageIndex
	if e.attrs.docker {
		mediaType = dockerIndex
	}
	for i, ref := range r.Refs {
		p := platforms.Normalize(ref.Platform)
		manifests[i].Platform = &p
	}
	return e.put(ctx, opts, "exporting manifest list", mediaType, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Manifests: manifests,
	})
}

// packedLayer is a layer as its tar.
type packedLayer struct {
	diffID    digest.Digest
	sizeBytes int64
}

func (e *imageExporter) pack(ctx context.Context, id layer.ID) (packedLayer, error) {
	info, err := e.deps.Layers.Pack(ctx, id)
	if err != nil {
		return packedLayer{}, fmt.Errorf("pack layer %s: %w", id, err)
	}
	tar, size, err := e.deps.Layers.OpenTar(ctx, id)
	if err != nil {
		return packedLayer{}, fmt.Errorf("pack layer %s: %w", id, err)
	}
	return packedLayer{info.DiffID, size}, tar.Close()
}

// manifest stores the config and the manifest of one platform, and notes the snapshot that it runs from.
func (e *imageExporter) manifest(ctx context.Context, r exporter.Result, ref exporter.Ref, layers []packedLayer, opts exporter.Options) (ocispec.Descriptor, error) {
	config, err := e.config(r, ref, layers, opts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	m.Config.MediaType = ocispec.MediaTypeImageConfig
	if e.attrs.docker {
		m.MediaType, m.Config.MediaType = dockerManifest, dockerConfig
	}
	done := opts.Step("exporting config " + digest.FromBytes(config).String())
	if m.Config, err = e.deps.Blobs.PutBytes(ctx, m.Config.MediaType, config); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("store image config: %w", err)
	}
	done()
	for _, l := range layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: compress.MediaType(compress.None, e.attrs.docker), Digest: l.diffID, Size: l.sizeBytes,
		})
	}
	desc, err := e.put(ctx, opts, "exporting manifest", m.MediaType, m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	// Before the image has a name, so that it is never seen without its layers.
	if err := e.deps.Images.SetLayers(ctx, desc.Digest, ref.Snapshot); err != nil {
		return ocispec.Descriptor{}, err
	}
	return desc, nil
}

// put stores a manifest or index as a blob.
func (e *imageExporter) put(ctx context.Context, opts exporter.Options, step, mediaType string, v any) (ocispec.Descriptor, error) {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	done := opts.Step(step + " " + digest.FromBytes(raw).String())
	desc, err := e.deps.Blobs.PutBytes(ctx, mediaType, raw)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("store image manifest: %w", err)
	}
	done()
	return desc, nil
}

// config is the image config of one platform.
func (e *imageExporter) config(r exporter.Result, ref exporter.Ref, layers []packedLayer, opts exporter.Options) ([]byte, error) {
	config := ref.Config
	if len(config) == 0 {
		var err error
		if config, err = exporter.DefaultConfig(ref.Platform); err != nil {
			return nil, err
		}
	}
	p := patch{steps: steps(ref.Chain, ref.Snapshot)}
	for _, l := range layers {
		p.diffIDs = append(p.diffIDs, l.diffID)
	}
	if len(ref.Base) > 0 {
		var base ocispec.Image
		if err := json.Unmarshal(ref.Base, &base); err != nil {
			return nil, fmt.Errorf("config of the base image: %w", err)
		}
		p.base = base.History
	}
	var err error
	if p.epoch, err = e.epoch(r, ref); err != nil {
		return nil, err
	}
	if p.epoch != nil {
		p.created = *p.epoch
		return p.apply(config)
	}
	// What is the same but for the time gets the time of the first: an image that is built again is the same image.
	timeless, err := p.apply(config)
	if err != nil {
		return nil, err
	}
	if p.created, err = e.firstExport(digest.FromBytes(timeless), opts); err != nil {
		return nil, err
	}
	return p.apply(config)
}

func (e *imageExporter) firstExport(key digest.Digest, opts exporter.Options) (time.Time, error) {
	raw, ok, err := e.deps.Records.GetValue(createdBucket, key.String())
	if err != nil {
		return time.Time{}, err
	}
	if ok {
		if t, err := time.Parse(time.RFC3339Nano, string(raw)); err == nil {
			return t, nil
		}
	}
	now := time.Now
	if opts.Now != nil {
		now = opts.Now
	}
	t := now().UTC()
	return t, e.deps.Records.PutValue(createdBucket, key.String(), []byte(t.Format(time.RFC3339Nano)))
}

// epoch is the latest time that may appear in the image: from the attributes, else from the frontend.
func (e *imageExporter) epoch(r exporter.Result, ref exporter.Ref) (*time.Time, error) {
	if e.attrs.epochSet {
		return e.attrs.epoch, nil
	}
	value := exptypes.ParseKey(r.Metadata, commonexptypes.ExporterEpochKey, &exptypes.Platform{ID: ref.ID})
	t, err := parseEpoch(string(value))
	if err != nil {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH=%s: %w", value, err)
	}
	return t, nil
}

// steps says how many layers each step of chain has made; nil when chain does not say how final came to be.
func steps(chain []snapshot.Snapshot, final snapshot.Snapshot) []int {
	if len(chain) == 0 || !slices.Equal(chain[len(chain)-1], final) {
		return nil
	}
	counts := []int{len(chain[0])}
	for i, s := range chain[1:] {
		if len(s) < len(chain[i]) || !slices.Equal(s[:len(chain[i])], chain[i]) {
			return nil // not built on the step before: a merge, or a diff
		}
		counts = append(counts, len(s)-len(chain[i]))
	}
	return counts
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
