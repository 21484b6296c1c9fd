// SPDX-License-Identifier: Apache-2.0

// Package reshape gives results other layers before they are exported as images: times clamped to SOURCE_DATE_EPOCH
// ("rewrite-timestamp", as BuildKit v0.34.2 has it), several layers made one ("squash"). The new layers are layers of the store
// like any others, so that an image runs from them and is pushed from them.
package reshape

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/layerblob"
)

// Squash is which layers become one.
type Squash string

// What can be squashed.
const (
	SquashNone Squash = ""
	// SquashAll makes the whole image one layer.
	SquashAll Squash = "all"
	// SquashNew makes the layers of this build one, over those of the base image, which stay.
	SquashNew Squash = "new"
)

// bucket of the record database has derived layers, under what they were derived from.
const bucket = "derived-layers"

// Options are what is asked for.
type Options struct {
	RewriteTimestamp bool
	Squash           Squash
}

// Set takes an attribute if it is one of these.
func (o *Options) Set(key, value string) (ok bool, err error) {
	switch key {
	case string(exptypes.OptKeyRewriteTimestamp):
		o.RewriteTimestamp = true
		if value != "" {
			if o.RewriteTimestamp, err = strconv.ParseBool(value); err != nil {
				err = errors.New("not true or false")
			}
		}
	case "squash":
		switch o.Squash = Squash(value); o.Squash {
		case SquashNone, SquashAll, SquashNew:
		default:
			err = fmt.Errorf("want %s (the whole image becomes one layer) or %s (the layers of this build do)", SquashAll, SquashNew)
		}
	default:
		return false, nil
	}
	return true, err
}

// Shaper reshapes results. It may be used concurrently.
type Shaper struct {
	Layers  *layer.Store
	Records *record.Store
	Blobs   *layerblob.Maker
}

// Apply returns r with other layers, as o says and, when c asks for eStargz, c. epoch gives the latest time that may appear in what is exported of a platform, nil when
// there is none; then times stay as they are and the client is told so.
func (s Shaper) Apply(ctx context.Context, r exporter.Result, o Options, c layerblob.Compression, epoch func(platformID string) (*time.Time, error), opts exporter.Options) (exporter.Result, error) {
	if o == (Options{}) && !c.Estargz {
		return r, nil
	}
	refs := r.Refs
	r.Refs = make([]exporter.Ref, len(refs))
	for i, ref := range refs {
		base, err := s.base(ctx, ref)
		if err != nil {
			return exporter.Result{}, err
		}
		if o.Squash != SquashNone {
			if ref, base, err = s.squash(ctx, ref, base, o.Squash, opts); err != nil {
				return exporter.Result{}, err
			}
		}
		if o.RewriteTimestamp {
			latest, err := epoch(ref.ID)
			if err != nil {
				return exporter.Result{}, err
			}
			if latest == nil {
				opts.Warn("rewrite-timestamp has no effect: SOURCE_DATE_EPOCH is not set")
			} else if ref, err = s.clamp(ctx, ref, base, *latest, opts); err != nil {
				return exporter.Result{}, err
			}
		}
		if c.Estargz {
			if ref, err = s.estargz(ctx, ref, c, opts); err != nil {
				return exporter.Result{}, err
			}
		}
		r.Refs[i] = ref
	}
	return r, nil
}

// Layer is what Apply will make of the i-th layer of snap, lowest first, which is going to be in the result of ref: for an export that
// begins before all of it is there. It is not ok when that cannot be known yet.
func (s Shaper) Layer(ctx context.Context, ref exporter.Ref, snap snapshot.Snapshot, i int, o Options, c layerblob.Compression, latest *time.Time) (id layer.ID, ok bool, err error) {
	id = snap[i]
	if o.Squash != SquashNone {
		return "", false, nil
	}
	if o.RewriteTimestamp && latest != nil {
		ref.Snapshot = snap
		base, err := s.base(ctx, ref)
		if err != nil {
			return "", false, err
		}
		if i >= base {
			if id, err = s.Clamp(ctx, id, *latest); err != nil {
				return "", false, err
			}
		}
	}
	if c.Estargz {
		if id, err = s.estargzLayer(ctx, id, snap[:i], c); err != nil {
			return "", false, err
		}
	}
	return id, true, nil
}

// base is how many of a platform's layers are those of its base image, by what the base image's config says.
func (s Shaper) base(ctx context.Context, ref exporter.Ref) (int, error) {
	if len(ref.Base) == 0 {
		return 0, nil
	}
	var config ocispec.Image
	if err := json.Unmarshal(ref.Base, &config); err != nil {
		return 0, fmt.Errorf("config of the base image: %w", err)
	}
	for i, id := range ref.Snapshot {
		info, err := s.Layers.Stat(ctx, id)
		if err != nil {
			return 0, err
		}
		if i == len(config.RootFS.DiffIDs) || info.DiffID != config.RootFS.DiffIDs[i] {
			return i, nil
		}
	}
	return len(ref.Snapshot), nil
}

// clamp rewrites the layers that are not the base image's.
func (s Shaper) clamp(ctx context.Context, ref exporter.Ref, base int, latest time.Time, opts exporter.Options) (exporter.Ref, error) {
	defer opts.Step(fmt.Sprintf("rewriting layers with source-date-epoch %d (%s)", latest.Unix(), latest.UTC()))()
	return replaced(ctx, ref, func(ctx context.Context, i int, id layer.ID) (layer.ID, error) {
		if i < base {
			return id, nil
		}
		return s.Clamp(ctx, id, latest)
	})
}

// estargz makes layers that have a form as eStargz.
func (s Shaper) estargz(ctx context.Context, ref exporter.Ref, c layerblob.Compression, opts exporter.Options) (exporter.Ref, error) {
	defer opts.Step("exporting layers as estargz")()
	return replaced(ctx, ref, func(ctx context.Context, i int, id layer.ID) (layer.ID, error) {
		return s.estargzLayer(ctx, id, ref.Snapshot[:i], c)
	})
}

func (s Shaper) estargzLayer(ctx context.Context, id layer.ID, under snapshot.Snapshot, c layerblob.Compression) (layer.ID, error) {
	level := "usual"
	if c.Level != nil {
		level = strconv.Itoa(*c.Level)
	}
	below, err := s.view(ctx, under)
	if err != nil {
		return "", err
	}
	good := func(made layer.ID) bool { return made == id || s.Blobs.IsEstargz(ctx, made) }
	return s.derive(fmt.Sprintf("estargz %s %v %s", level, c.Force, id), good, func() (layer.ID, error) {
		return s.Blobs.Estargz(ctx, id, below, c)
	})
}

// view is what a stack of layers shows.
func (s Shaper) view(ctx context.Context, snap snapshot.Snapshot) (view, error) {
	stack := make([]*index.Index, len(snap))
	for i, id := range snap {
		var err error
		if stack[i], err = s.Layers.Index(ctx, id); err != nil {
			return view{}, err
		}
	}
	return view{index.Merge(stack...), s.Layers, snap}, nil
}

// view implements layer.Files.
type view struct {
	*index.View
	layers *layer.Store
	snap   snapshot.Snapshot
}

func (v view) OpenFile(ctx context.Context, path string) (io.ReadCloser, error) {
	i, ok := v.Layer(path)
	if !ok {
		return nil, fmt.Errorf("open %q: %w", path, fs.ErrNotExist)
	}
	return v.layers.OpenFile(ctx, v.snap[i], path)
}

// Clamp is layer.Store.Clamp, remembered.
func (s Shaper) Clamp(ctx context.Context, id layer.ID, latest time.Time) (layer.ID, error) {
	return s.derive(fmt.Sprintf("clamp %d %s", latest.Unix(), id), nil, func() (layer.ID, error) {
		return s.Layers.Clamp(ctx, id, latest)
	})
}

// replaced is ref with another layer in the place of each. Which step has made which of them stays known.
func replaced(ctx context.Context, ref exporter.Ref, replace func(ctx context.Context, i int, id layer.ID) (layer.ID, error)) (exporter.Ref, error) {
	old := ref.Snapshot
	snap := make(snapshot.Snapshot, len(old))
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, id := range old {
		group.Go(func() (err error) {
			snap[i], err = replace(gctx, i, id)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return exporter.Ref{}, err
	}
	chain := ref.Chain
	ref.Snapshot, ref.Chain = snap, nil
	for _, step := range chain {
		if len(step) > len(old) || !slices.Equal(step, old[:len(step)]) {
			ref.Chain = nil // not built on the step before
			break
		}
		ref.Chain = append(ref.Chain, snap[:len(step):len(step)])
	}
	return ref, nil
}

// squash makes one layer of those from base on, or of all, and returns how many of the result are the base image's.
func (s Shaper) squash(ctx context.Context, ref exporter.Ref, base int, which Squash, opts exporter.Options) (exporter.Ref, int, error) {
	if which == SquashAll {
		base = 0
	}
	if len(ref.Snapshot)-base < 2 {
		return ref, base, nil
	}
	defer opts.Step(fmt.Sprintf("squashing %d layers", len(ref.Snapshot)-base))()
	var below index.Tree
	if base > 0 {
		var err error
		if below, err = s.view(ctx, ref.Snapshot[:base]); err != nil {
			return exporter.Ref{}, 0, err
		}
	}
	names := make([]string, len(ref.Snapshot))
	for i, id := range ref.Snapshot {
		names[i] = string(id)
	}
	// What is below decides too: over something else, other whiteouts are needed.
	key := "squash " + digest.FromString(strconv.Itoa(base)+" "+strings.Join(names, " ")).String()
	id, err := s.derive(key, nil, func() (layer.ID, error) { return s.Layers.Flatten(ctx, ref.Snapshot[base:], below) })
	if err != nil {
		return exporter.Ref{}, 0, err
	}
	ref.Snapshot = append(ref.Snapshot[:base:base], id)
	ref.Chain = nil
	if which == SquashAll {
		ref.Base = nil
	}
	ref.Config, err = squashHistory(ref, base)
	return ref, base, err
}

// squashHistory leaves in the image's history what was done, but says that the layers from base on are one: that of a last line.
func squashHistory(ref exporter.Ref, base int) ([]byte, error) {
	config := ref.Config
	if len(config) == 0 {
		var err error
		if config, err = exporter.DefaultConfig(ref.Platform); err != nil {
			return nil, err
		}
	}
	doc := map[string]json.RawMessage{}
	var known struct {
		History []ocispec.History `json:"history"`
	}
	if err := errors.Join(json.Unmarshal(config, &doc), json.Unmarshal(config, &known)); err != nil {
		return nil, fmt.Errorf("image config from the frontend: %w", err)
	}
	layers := 0
	for i := range known.History {
		h := &known.History[i]
		if h.EmptyLayer {
			continue
		}
		if layers++; layers > base {
			h.EmptyLayer = true
		}
	}
	known.History = append(known.History, ocispec.History{CreatedBy: "squash", Comment: "slipway.exporter.squash.v0"})
	raw, err := json.Marshal(known.History)
	if err != nil {
		return nil, err
	}
	doc["history"] = raw
	return json.Marshal(doc)
}

// derive returns the layer that was derived under key before, if it is still there and, when that is asked, good; or makes it.
func (s Shaper) derive(key string, good func(layer.ID) bool, make func() (layer.ID, error)) (layer.ID, error) {
	raw, ok, err := s.Records.GetValue(bucket, key)
	if err != nil {
		return "", err
	}
	if id := layer.ID(raw); ok && s.Layers.Exists(id) {
		// Stat is a use, so that the layer stays from now on.
		if _, err := s.Layers.Stat(context.Background(), id); err == nil && (good == nil || good(id)) {
			return id, nil
		}
	}
	id, err := make()
	if err != nil {
		return "", err
	}
	return id, s.Records.PutValue(bucket, key, []byte(id))
}
