// SPDX-License-Identifier: Apache-2.0

package layerblob

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/compress"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
)

// annotationsBucket of the record database has the annotations that a blob must have in manifests, under its digest.
const annotationsBucket = "blob-annotations"

// Estargz returns the layer whose blob is layer id as eStargz, which is made and remembered as the form of that layer, like
// one that was pulled. The tar of id is in it byte for byte, and behind it the table of contents. below is what id lies on. With force unset,
// a layer that was pulled stays as it is.
func (m *Maker) Estargz(ctx context.Context, id layer.ID, below index.Tree, c Compression) (layer.ID, error) {
	info, err := m.deps.Layers.Pack(ctx, id)
	if err != nil {
		return "", fmt.Errorf("pack layer %s: %w", id, err)
	}
	if !c.Force {
		if _, ok, err := m.pulled(info.DiffID, Compression{Kind: compress.Gzip}); err != nil || ok {
			return id, err
		}
	}
	release, err := m.making.Acquire(ctx, info.DiffID.String())
	if err != nil {
		return "", err
	}
	defer release()
	made, err := m.estargz(ctx, id, info.DiffID, below, c.Level)
	if err != nil {
		return "", fmt.Errorf("make layer %s an estargz: %w", info.DiffID, err)
	}
	return made, nil
}

// IsEstargz says whether a layer has a blob that Estargz has made.
func (m *Maker) IsEstargz(ctx context.Context, id layer.ID) bool {
	info, err := m.deps.Layers.Stat(ctx, id)
	if err != nil || info.DiffID == "" {
		return false
	}
	desc, ok, err := m.memo.Get(info.DiffID, compress.Gzip)
	if err != nil || !ok {
		return false
	}
	annotations, err := m.annotations(desc.Digest)
	return err == nil && annotations[estargz.TOCJSONDigestAnnotation] != ""
}

func (m *Maker) estargz(ctx context.Context, id layer.ID, diffID digest.Digest, below index.Tree, level *int) (layer.ID, error) {
	tar, _, err := m.deps.Layers.OpenTar(ctx, id)
	if err != nil {
		return "", err
	}
	defer tar.Close()
	w, err := m.deps.Blobs.Writer(ctx)
	if err != nil {
		return "", err
	}
	defer w.Close()
	_, _, usual := compress.Levels(compress.Gzip)
	if level == nil {
		level = &usual
	}
	buffered := bufio.NewWriterSize(w, 1<<20)
	free, err := m.slot(ctx)
	if err != nil {
		return "", err
	}
	z, err := writeStargz(ctx, buffered, tar, diffID, *level, 0)
	free()
	if err != nil {
		return "", err
	}
	if err := buffered.Flush(); err != nil {
		return "", err
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: w.Digest(), Size: w.Size()}
	if err := w.Commit(desc.Size, desc.Digest); err != nil {
		return "", err
	}
	r, err := m.deps.Blobs.Open(desc.Digest)
	if err != nil {
		return "", err
	}
	defer r.Close()
	plain, _, err := compress.NewReader(r)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	made, err := m.deps.Layers.Unpack(ctx, plain, z.diffID, below)
	if err != nil {
		return "", err
	}
	again, sizeBytes, err := m.deps.Layers.OpenTar(ctx, made)
	if err != nil {
		return "", err
	}
	_ = again.Close()
	err = m.annotate(desc.Digest, map[string]string{
		estargz.TOCJSONDigestAnnotation:         z.toc.String(),
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(sizeBytes, 10),
	})
	if err != nil {
		return "", err
	}
	return made, m.memo.Put(z.diffID, compress.Gzip, desc)
}

func (m *Maker) annotate(blob digest.Digest, annotations map[string]string) error {
	raw, err := json.Marshal(annotations)
	if err != nil {
		return err
	}
	return m.deps.Records.PutValue(annotationsBucket, blob.String(), raw)
}

// annotations are those that a blob must have in manifests, nil for most.
func (m *Maker) annotations(blob digest.Digest) (annotations map[string]string, err error) {
	raw, ok, err := m.deps.Records.GetValue(annotationsBucket, blob.String())
	if err != nil || !ok {
		return nil, err
	}
	if err := json.Unmarshal(raw, &annotations); err != nil {
		return nil, fmt.Errorf("annotations of blob %s: %w", blob, err)
	}
	return annotations, nil
}
