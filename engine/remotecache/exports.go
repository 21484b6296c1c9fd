// SPDX-License-Identifier: Apache-2.0

package remotecache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/share/s3"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine/explain"
	"github.com/seed-68981b69/slipway/solver"
)

// ManifestKey is the key of a build's response with the descriptor of the cache's manifest, JSON: clients give it a tag in their directory.
const ManifestKey = "cache.manifest"

// Exports are the caches that one build is exported to.
type Exports struct {
	caches *Caches
	build  *solver.Build
	// attrs are the build's: what in records is not for everybody.
	attrs map[string]string
	list  []*exporting
	began time.Time
	// whole is set when everything is exported that the engine knows.
	whole bool
	// inline is set when the images' configs have a cache.
	inline bool
}

// exporting is one cache on its way.
type exporting struct {
	spec   ExportSpec
	number int
	export *share.Export // nil when err says why
	err    error
	// manifest is what PutRef has written; nil where there are no manifests.
	manifest func() ocispec.Descriptor
	close    func() error // of the place; may be nil
	stop     func()

	mu     sync.Mutex // guards progress
	report solver.Progress
	warned []string
}

// Begin opens the places of specs, those that are inline left out, and begins to send what is certain to be exported. ref names the
// build. Finish or Stop it.
func (c *Caches) Begin(ctx context.Context, specs []ExportSpec, session Session, build *solver.Build, imports *Imports, attrs map[string]string) *Exports {
	x := &Exports{caches: c, build: build, attrs: attrs, began: time.Now()}
	for i, spec := range specs {
		if spec.Type == TypeInline {
			x.inline = true
			continue
		}
		e := &exporting{spec: spec, number: i, stop: func() {}}
		x.list = append(x.list, e)
		backend, name, err := c.destination(ctx, spec, session, imports, e)
		if err != nil {
			e.err = err
			continue
		}
		e.export = share.NewExport(ctx, share.ExportOptions{
			Backend: backend, Name: name, Layers: layers{c, spec.Compression}, Chunked: spec.Chunked, Progress: e.progress, Warn: e.warn,
		})
		if spec.Max {
			e.stop = build.WatchAll(e.export.Add)
		}
	}
	return x
}

// destination opens the place of an export.
func (c *Caches) destination(ctx context.Context, spec ExportSpec, session Session, imports *Imports, e *exporting) (share.Backend, string, error) {
	switch spec.Type {
	case TypeRegistry:
		repository, err := c.repository(session, spec.Ref, spec.Insecure)
		if err != nil {
			return nil, "", err
		}
		e.manifest = repository.Manifest
		return repository, spec.Ref, nil
	case TypeLocal:
		store, err := contentStore(ctx, session, spec.Dir)
		if err != nil {
			return nil, "", err
		}
		content := share.OpenContent(store, imports.directory(spec.Dir))
		e.manifest = content.Manifest
		return content, "", nil
	case TypeS3:
		bucket, err := s3.New(spec.Bucket)
		if err != nil {
			return nil, "", err
		}
		e.close = bucket.Close
		return bucket, spec.Name, nil
	}
	return nil, "", fmt.Errorf("cache export of type %s is not supported", spec.Type)
}

// Whole has everything exported that the engine knows.
func (x *Exports) Whole() { x.whole = true }

// Certain says that snap is going to be in the result of the build.
func (x *Exports) Certain(snap snapshot.Snapshot) {
	for _, e := range x.list {
		if e.export != nil && !e.spec.Max {
			e.export.Add(snap)
		}
	}
}

// Wanted reports whether anything is exported of a build that has failed or not.
func (x *Exports) Wanted(failed bool) bool {
	return slices.ContainsFunc(x.list, func(e *exporting) bool { return !failed || e.spec.OnFailure })
}

// Stop gives up what has been begun, and ends what has been finished.
func (x *Exports) Stop(cause error) {
	for _, e := range x.list {
		e.stop()
		if e.export != nil {
			e.export.Stop(cause)
		}
		if e.close != nil {
			_ = e.close()
		}
	}
}

// Finish exports a build whose calls of Result have returned, each export shown as a step, and returns what clients are told. results are
// what the build has made; of a build that has failed there are none, and only those exports are made that want it.
func (x *Exports) Finish(ctx context.Context, results []snapshot.Snapshot, failed bool, step Step) (map[string]string, error) {
	response := map[string]string{}
	var mu sync.Mutex // guards response and errs
	var errs []error
	var group sync.WaitGroup
	for _, e := range x.list {
		e.stop()
		if failed && !e.spec.OnFailure {
			if e.export != nil {
				e.export.Stop(errors.New("the build has failed"))
			}
			continue
		}
		group.Go(func() {
			err := e.finish(ctx, x, results, failed, step)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, fmt.Errorf("export cache to %s: %w", e.spec, err))
				return
			}
			if e.manifest == nil {
				return
			}
			if raw, err := json.Marshal(e.manifest()); err == nil && (e.spec.Type == TypeLocal || response[ManifestKey] == "") {
				response[ManifestKey] = string(raw)
			}
		})
	}
	group.Wait()
	return response, errors.Join(errs...)
}

// finish is one export.
func (e *exporting) finish(ctx context.Context, x *Exports, results []snapshot.Snapshot, failed bool, step Step) error {
	name := "exporting cache to registry"
	switch e.spec.Type {
	case TypeLocal:
		name = "exporting cache to client directory"
	case TypeS3:
		name = "exporting cache to S3"
	}
	var ignored error
	err := step(ctx, name, digest.FromString(fmt.Sprintf("export cache %d %s", e.number, e.spec.key())), func(env *solver.Env) error {
		e.show(env.Progress)
		err := e.err
		if err == nil {
			keys := e.export.Keys()
			items, used := x.items(ctx, e.spec.Max || failed || x.whole, results, keys)
			if len(e.spec.Mounts) > 0 {
				err = e.mounts(x, env.Progress)
			}
			var done share.Exported
			if err != nil {
				e.export.Stop(err)
			} else if done, err = e.export.Finish(items, used); err == nil {
				env.Progress.Log(1, fmt.Appendf(nil, "%d records of this build, %d in all\n", done.Own, done.Records))
			}
		}
		if err != nil && e.spec.IgnoreError && ctx.Err() == nil {
			ignored = err
			env.Progress.Warn(fmt.Sprintf("the cache has not been exported to %s: %v", e.spec, err))
			return nil
		}
		return err
	})
	if ignored != nil {
		x.caches.deps.Log.Warn("export cache", "to", e.spec.String(), "error", ignored)
		e.manifest = func() ocispec.Descriptor { return ocispec.Descriptor{} }
	}
	return err
}

// show sends what is said from now on to p, and what has been said before.
func (e *exporting) show(p solver.Progress) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.report = p
	for _, w := range e.warned {
		p.Warn(w)
	}
	e.warned = nil
}

func (e *exporting) warn(w string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.report == nil {
		e.warned = append(e.warned, w)
		return
	}
	e.report.Warn(w)
}

func (e *exporting) progress(id string, current, total int64, done bool) {
	e.mu.Lock()
	p := e.report
	e.mu.Unlock()
	if p != nil {
		p.Status("writing layer "+id, current, total, done)
	}
}

// items are what a build has to say: the records of all its steps, or of those whose layers are all among results'; what the place has
// already (have) of steps that were not needed is only used again.
func (x *Exports) items(ctx context.Context, all bool, results []snapshot.Snapshot, have map[string]bool) (items []share.Item, used []string) {
	wanted := map[layer.ID]bool{}
	for _, snap := range results {
		for _, id := range snap {
			wanted[id] = true
		}
	}
	hide := explain.Hide(x.attrs)
	seen := map[string]bool{}
	add := func(key string, rec *record.Record) {
		if seen[key] {
			return
		}
		seen[key] = true
		if !all {
			for _, snap := range rec.Outputs {
				if slices.ContainsFunc(snap, func(id layer.ID) bool { return !wanted[id] }) {
					return
				}
			}
		}
		shown, redacted := hide(rec)
		items = append(items, share.Item{Key: key, Record: shown, Redacted: redacted})
	}
	if x.whole {
		known := map[string]*record.Record{}
		err := x.caches.deps.Records.Walk(ctx, func(key string, rec *record.Record) error {
			known[key] = rec
			return nil
		})
		if err != nil {
			x.caches.deps.Log.Warn("export all records", "error", err)
		}
		for _, key := range slices.Sorted(maps.Keys(known)) {
			if x.there(ctx, known[key]) {
				add(key, known[key])
			}
		}
		return items, nil
	}
	for _, rep := range x.build.Reports() {
		if rep.ByContent || rep.Recipe == "" {
			continue
		}
		if rep.Outcome == solver.Skipped && have[string(rep.Recipe)] {
			used = append(used, string(rep.Recipe))
			if rec, ok, err := x.caches.deps.Records.Get(ctx, string(rep.Recipe)); err == nil && ok && rec.ContentKey != "" {
				used = append(used, rec.ContentKey)
			}
			continue
		}
		outputs := solver.Outputs(rep.Vertex)
		content := string(rep.Content)
		if rec, ok := x.build.Lookup(ctx, string(rep.Recipe), outputs); ok {
			add(string(rep.Recipe), rec)
			if content == "" {
				content = rec.ContentKey
			}
		}
		if content == "" {
			continue
		}
		if rec, ok := x.build.Lookup(ctx, content, outputs); ok {
			add(content, rec)
		}
	}
	return items, used
}

// there reports whether all layers of a record are known.
func (x *Exports) there(ctx context.Context, rec *record.Record) bool {
	for _, snap := range rec.Outputs {
		for _, id := range snap {
			if _, err := x.caches.deps.Layers.Stat(ctx, id); err != nil {
				return false
			}
		}
	}
	return true
}

// Inline puts the records of steps into the config of an image of that root file system, if that is wanted.
func (x *Exports) Inline(ctx context.Context, config []byte, snap snapshot.Snapshot) ([]byte, error) {
	if !x.inline {
		return config, nil
	}
	items, _ := x.items(ctx, false, []snapshot.Snapshot{snap}, nil)
	document, err := share.Inline(ctx, layers{caches: x.caches}, items)
	if err != nil {
		return nil, fmt.Errorf("inline cache: %w", err)
	}
	members := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &members); err != nil {
		return nil, fmt.Errorf("inline cache: image config: %w", err)
	}
	if members[share.InlineKey], err = json.Marshal(document); err != nil {
		return nil, err
	}
	return json.Marshal(members)
}
