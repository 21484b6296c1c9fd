// SPDX-License-Identifier: Apache-2.0

// Package exporter takes the result of a build out of the solver: into the local image store, to a registry, into
// archives and directories of the client. What an export is made of and the interface of those that make one are here; each type of
// export has a folder of its own.
package exporter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
)

// Result is what a build leaves: a root file system and a config for each platform, and what the frontend says
// about all of it.
type Result struct {
	// Refs are in the order of the platforms; there is at least one.
	Refs []Ref
	// MultiPlatform makes an image index even of a single Ref.
	MultiPlatform bool
	// Metadata is what the frontend's result says, with exptypes' keys.
	Metadata map[string][]byte
}

// Ref is the result for one platform.
type Ref struct {
	// ID names the platform in Metadata ("linux/amd64"); it may be "" for a single Ref.
	ID       string
	Platform ocispec.Platform
	Snapshot snapshot.Snapshot
	// Config is the image config from the frontend, JSON; nil means that it gave none.
	Config []byte
	// Base is the config of the image that Config was derived from; nil when there is none.
	Base []byte
	// Chain, when set, is the root file system after each step that leads to Snapshot, beginning with the source
	// (empty for scratch) and ending with Snapshot. It says which line of the history has made which layer: a step that
	// changed nothing has none.
	Chain []snapshot.Snapshot
	// Made is when the newest step was done, on whatever machine; zero when that is not known.
	Made time.Time
	// Attestations are what is said about this platform's result.
	Attestations []Attestation
}

// NewResult puts together what a frontend returned: its metadata, and the snapshot of each platform by its ID, or of
// the only one under "".
func NewResult(metadata map[string][]byte, snapshots map[string]snapshot.Snapshot) (Result, error) {
	r := Result{Metadata: metadata}
	ps, err := exptypes.ParsePlatforms(metadata)
	if err != nil {
		return Result{}, fmt.Errorf("result of the build: %w", err)
	}
	single, isSingle := snapshots[""]
	if isSingle && len(ps.Platforms) > 1 {
		return Result{}, fmt.Errorf("result of the build: one root file system for %d platforms", len(ps.Platforms))
	}
	r.MultiPlatform = !isSingle
	for _, p := range ps.Platforms {
		snap, ok := snapshots[p.ID]
		if isSingle {
			snap, ok = single, true
		}
		if !ok {
			return Result{}, fmt.Errorf("result of the build: nothing for platform %s (there are: %s)", p.ID, strings.Join(slices.Sorted(maps.Keys(snapshots)), ", "))
		}
		r.Refs = append(r.Refs, Ref{
			ID: p.ID, Platform: p.Platform, Snapshot: snap,
			Config: exptypes.ParseKey(metadata, exptypes.ExporterImageConfigKey, &p),
			Base:   exptypes.ParseKey(metadata, exptypes.ExporterImageBaseConfigKey, &p),
		})
	}
	return r, nil
}

// Options are what an export may use of the build that it ends.
type Options struct {
	// Progress takes what is being done; nil is allowed.
	Progress solver.Progress
	// Credentials are those of the build's client; nil means docker's config.json only.
	Credentials registry.Credentials
	// Tokens are fetched by the client itself; nil when it does not.
	Tokens registry.TokenSource
	// Output is the client's end of this export; nil when there is none.
	Output Output
	// Layers, when set, is told as which blobs an image has the layers of the Ref with that ID.
	Layers func(id string, layers LayerBlobs)
	// Now is the clock for images that do not say when they were made; nil means time.Now.
	Now func() time.Time
}

// Output is where an export goes that ends at the client of the build. One export uses one of the methods, once.
type Output interface {
	// File opens a stream to a file of the client, who is told facts about it. What was written counts only after a
	// Close without an error; an export that fails ends ctx before it calls Close. Errors of all three may wrap ErrExists.
	File(ctx context.Context, facts map[string]string) (io.WriteCloser, error)
	// Dir copies files into a directory of the client. With mirror the directory has nothing else in it afterwards. progress is
	// called with the bytes that have been sent.
	Dir(ctx context.Context, files fsutil.FS, mirror bool, progress func(sentBytes int64, done bool)) error
	// Blobs takes blobs into an image layout of the client, who writes its index.json.
	Blobs(ctx context.Context) (content.Ingester, error)
}

// ErrExists is what errors wrap when the client does not want the file because it has it already.
var ErrExists = errors.New("the client has the file already")

// Step reports a step of an export and returns the function that ends it.
func (o Options) Step(id string) (done func()) {
	if o.Progress == nil {
		return func() {}
	}
	o.Progress.Status(id, 0, 0, false)
	return func() { o.Progress.Status(id, 0, 0, true) }
}

// Transfer reports bytes under an ID made from prefix, the name of what is transferred, and a space.
func (o Options) Transfer(prefix string) func(id string, current, total int64, done bool) {
	if o.Progress == nil {
		return func(string, int64, int64, bool) {}
	}
	return func(id string, current, total int64, done bool) {
		o.Progress.Status(prefix+" "+id, current, total, done)
	}
}

// Warn tells the client of the build what it may not have meant.
func (o Options) Warn(short string) {
	if o.Progress != nil {
		o.Progress.Warn(short)
	}
}

// Bytes reports the bytes of one step of an export, some times a second. The returned function is called by one goroutine at a
// time, with all bytes so far; the end is when done is first true. total is 0 when it is not known.
func (o Options) Bytes(id string, total int64) func(current int64, done bool) {
	if o.Progress == nil {
		return func(int64, bool) {}
	}
	const interval = 100 * time.Millisecond
	var last time.Time
	ended := false
	o.Progress.Status(id, 0, total, false)
	return func(current int64, done bool) {
		if now := time.Now(); !ended && (done || now.Sub(last) >= interval) {
			last, ended = now, done
			o.Progress.Status(id, current, total, done)
		}
	}
}

// Private is an Exporter that can say that nobody but this engine sees what it makes. Its image may have another digest than the one that
// others get of the same result: when a build has several outputs, theirs are what its client is told.
type Private interface {
	Exporter
	Private() bool
}

// Exporter takes results out. It may be used concurrently.
type Exporter interface {
	// Name is what progress calls the export ("exporting to image").
	Name() string
	// Export returns what a client is told about the result, with exptypes' keys. After an error nothing has a new
	// name that is not whole: an image whose push failed is in the local store, but not in the registry.
	Export(ctx context.Context, r Result, opts Options) (map[string]string, error)
}

// CacheOnly is the factory for the type "cacheonly": the build is made, and nothing is done with its result.
func CacheOnly(attrs map[string]string) (Exporter, error) {
	for _, key := range slices.Sorted(maps.Keys(attrs)) {
		if key != string(commonexptypes.OptKeySourceDateEpoch) {
			return nil, fmt.Errorf("attribute not supported yet: %s=%s", key, attrs[key])
		}
	}
	return cacheOnly{}, nil
}

type cacheOnly struct{}

func (cacheOnly) Name() string { return "exporting to cache only" }

func (cacheOnly) Export(context.Context, Result, Options) (map[string]string, error) { return nil, nil }

// Factory makes an exporter from its attributes. It refuses, by name, those that it does not honour.
type Factory func(attrs map[string]string) (Exporter, error)

// Types are the exporters that there are, by the type a client asks for.
type Types map[string]Factory

// New returns the exporter of a type with attrs.
func (t Types) New(typ string, attrs map[string]string) (Exporter, error) {
	f, ok := t[typ]
	if !ok {
		return nil, fmt.Errorf("output not supported yet: type=%s (there are: %s)", typ, strings.Join(slices.Sorted(maps.Keys(t)), ", "))
	}
	e, err := f(attrs)
	if err != nil {
		return nil, fmt.Errorf("output type=%s: %w", typ, err)
	}
	return e, nil
}

// DefaultConfig is the image config for a result that comes without one, as BuildKit makes it.
func DefaultConfig(p ocispec.Platform) ([]byte, error) {
	p = platforms.Normalize(p)
	img := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}
	img.Config.WorkingDir = "/"
	img.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return json.Marshal(img)
}
