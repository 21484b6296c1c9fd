// SPDX-License-Identifier: Apache-2.0

// Package ocilayout exports results as OCI image layouts, in a tar or as a directory of the client, and as the archives of
// `docker save`, which are OCI layouts with a manifest.json.
//
// A layer that is wanted uncompressed is copied from its tar; others come from the blob store, where they are made once.
// The same result exported twice is the same archive, to the byte.
package ocilayout

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/image"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
	"github.com/seed-68981b69/slipway/exporter/reshape"
)

// Variant is which of the two formats.
type Variant string

// The variants, which are also the types that clients ask for.
const (
	OCI    Variant = "oci"
	Docker Variant = "docker"
)

// annotationImageName is containerd's, with the full name; OCI's own annotation is the tag alone.
const annotationImageName = "io.containerd.image.name"

// parallel is how many layers are worked on at once; each is compressed with all processors.
const parallel = 4

// Deps is what exports work with.
type Deps struct {
	Layers  *layerblob.Maker
	Blobs   *blob.Store
	Records *record.Store
	// Store is where layers of another shape are made, and in whose indexes is looked up in which layer a file of an SBOM is.
	Store *layer.Store
}

// New returns the factory for a variant.
func New(variant Variant, deps Deps) exporter.Factory {
	return func(given map[string]string) (exporter.Exporter, error) {
		a, err := parseAttrs(given)
		if err != nil {
			return nil, err
		}
		return &layoutExporter{variant: variant, deps: deps, attrs: a}, nil
	}
}

type layoutExporter struct {
	variant Variant
	deps    Deps
	attrs   attrs
}

func (e *layoutExporter) Name() string { return fmt.Sprintf("exporting to %s image format", e.variant) }

// Export implements exporter.Exporter: compress, assemble, send.
func (e *layoutExporter) Export(ctx context.Context, r exporter.Result, opts exporter.Options) (map[string]string, error) {
	if opts.Output == nil {
		return nil, fmt.Errorf("export %s image: the client has no place for it", e.variant)
	}
	if e.variant == Docker && (r.MultiPlatform || len(r.Refs) > 1) {
		return nil, errors.New("export docker image: the format has no images of several platforms: use type=oci, or build for one platform")
	}
	switch {
	case e.variant == Docker: // has no place for them
		r = r.WithoutAttestations(func(exporter.Attestation) bool { return true })
	case !e.attrs.inline:
		r = r.WithoutInlineOnly()
	}
	names, err := image.Names(e.attrs.names, r)
	if err != nil {
		return nil, err
	}
	shaper := reshape.Shaper{Layers: e.deps.Store, Records: e.deps.Records, Blobs: e.deps.Layers}
	r, err = shaper.Apply(ctx, r, e.attrs.reshape, e.attrs.compression, func(platformID string) (*time.Time, error) {
		return image.Epoch(r, platformID, e.attrs.epoch, e.attrs.epochSet)
	}, opts)
	if err != nil {
		return nil, fmt.Errorf("export %s image: %w", e.variant, err)
	}
	l, err := e.layout(ctx, r, names, opts)
	if err != nil {
		return nil, fmt.Errorf("export %s image: %w", e.variant, err)
	}
	response, err := l.response()
	if err != nil {
		return nil, err
	}
	if e.attrs.tar {
		err = exporter.Stream(ctx, opts, response, func(w io.Writer) error { return l.writeTar(ctx, w) })
	} else {
		err = l.send(ctx, opts)
	}
	if err != nil {
		return nil, fmt.Errorf("export %s image: %w", e.variant, err)
	}
	return response, nil
}

var _ exporter.Eager = (*layoutExporter)(nil)

// Begin implements exporter.Eager: layers are packed and compressed while later steps run.
func (e *layoutExporter) Begin(ctx context.Context, r exporter.Result, _ exporter.Options) (*exporter.Early, error) {
	shaper := reshape.Shaper{Layers: e.deps.Store, Records: e.deps.Records, Blobs: e.deps.Layers}
	return exporter.NewEarly(ctx, func(ctx context.Context, ref exporter.Ref, snap snapshot.Snapshot, i int) error {
		latest, err := image.Epoch(r, ref.ID, e.attrs.epoch, e.attrs.epochSet)
		if err != nil {
			return err
		}
		id, ok, err := shaper.Layer(ctx, ref, snap, i, e.attrs.reshape, e.attrs.compression, latest)
		if err != nil || !ok {
			return err
		}
		_, err = e.deps.Layers.Layer(ctx, id, e.attrs.compression.Shaped())
		return err
	}), nil
}

// layout is an image that is ready to be sent.
type layout struct {
	image.Assembled
	names []string
	// blobs are what the layout consists of, each once: layers, configs, manifests, and last the index if there is one.
	blobs []content
	// docker says that there are the files of docker's archives too.
	docker bool
}

// content is a blob and where it comes from.
type content struct {
	desc ocispec.Descriptor
	open func(context.Context) (io.ReadCloser, error)
}

// layout makes everything.
func (e *layoutExporter) layout(ctx context.Context, r exporter.Result, names []string, opts exporter.Options) (*layout, error) {
	done := opts.Step("exporting layers")
	made := make([][]layerblob.Blob, len(r.Refs))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for i, ref := range r.Refs {
		made[i] = make([]layerblob.Blob, len(ref.Snapshot))
		for j, id := range ref.Snapshot {
			group.Go(func() (err error) {
				made[i][j], err = e.deps.Layers.Layer(gctx, id, e.attrs.compression.Shaped())
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	done()
	layers := make([][]image.Layer, len(made))
	for i := range made {
		for _, b := range made[i] {
			layers[i] = append(layers[i], image.Layer{Desc: b.Desc, DiffID: b.DiffID})
		}
	}
	assembled, err := image.Assembler{
		Blobs: e.deps.Blobs, Records: e.deps.Records,
		Docker: e.attrs.docker, Annotations: e.attrs.annotations, Epoch: e.attrs.epoch, EpochSet: e.attrs.epochSet,
		Names: names, NoArtifact: e.attrs.artifact != nil && !*e.attrs.artifact, Layers: e.deps.Store,
	}.Assemble(ctx, r, layers, opts)
	if err != nil {
		return nil, err
	}
	l := &layout{Assembled: assembled, names: names, docker: e.variant == Docker}
	l.annotate()
	l.collect(e.deps, made)
	return l, nil
}

// annotate says when the image was made, as BuildKit does; not when it was exported, so that it is the same image the next time.
func (l *layout) annotate() {
	annotations := maps.Clone(l.Target.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	if _, ok := annotations[ocispec.AnnotationCreated]; !ok {
		annotations[ocispec.AnnotationCreated] = l.Created.UTC().Format(time.RFC3339)
	}
	l.Target.Annotations = annotations
}

func (l *layout) collect(deps Deps, layers [][]layerblob.Blob) {
	seen := map[digest.Digest]bool{}
	add := func(desc ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) {
		if !seen[desc.Digest] {
			seen[desc.Digest] = true
			l.blobs = append(l.blobs, content{desc, open})
		}
	}
	stored := func(desc ocispec.Descriptor) {
		add(desc, func(context.Context) (io.ReadCloser, error) { return layerblob.OpenBlob(deps.Blobs, desc) })
	}
	for i := range layers {
		for j, b := range layers[i] {
			add(l.Manifests[i].Layers[j], func(ctx context.Context) (io.ReadCloser, error) { return deps.Layers.Open(ctx, b) })
		}
	}
	for _, m := range l.Attestations {
		for _, statement := range m.Layers {
			stored(statement)
		}
	}
	manifests := slices.Concat(l.Manifests, l.Attestations)
	for _, m := range manifests {
		stored(m.Config)
	}
	for _, m := range manifests {
		stored(m.Desc)
	}
	stored(l.Target)
}

// response is what BuildKit's clients look for; those that make a directory write its index.json from it.
func (l *layout) response() (map[string]string, error) {
	raw, err := json.Marshal(l.Target)
	if err != nil {
		return nil, err
	}
	response := map[string]string{
		exptypes.ExporterImageDigestKey:     l.Target.Digest.String(),
		exptypes.ExporterImageDescriptorKey: base64.StdEncoding.EncodeToString(raw),
	}
	if !l.IsIndex() {
		response[exptypes.ExporterImageConfigDigestKey] = l.Manifests[0].Config.Digest.String()
	}
	if len(l.names) > 0 {
		response[exptypes.ExporterImageNameKey] = strings.Join(l.names, ",")
	}
	return response, nil
}

// index is the layout's index.json: the image once for each of its names.
func (l *layout) index() ([]byte, error) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, name := range l.names {
		desc := l.Target
		desc.Annotations = maps.Clone(desc.Annotations)
		desc.Annotations[annotationImageName] = name
		desc.Annotations[ocispec.AnnotationRefName] = tagOf(name)
		index.Manifests = append(index.Manifests, desc)
	}
	if len(l.names) == 0 {
		index.Manifests = append(index.Manifests, l.Target)
	}
	return marshal(index)
}

// tagOf is the tag of a normalised name.
func tagOf(name string) string {
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[i+1:]
	}
	return name
}

// marshal writes JSON with < and & as they are.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
