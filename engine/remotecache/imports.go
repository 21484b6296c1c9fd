// SPDX-License-Identifier: Apache-2.0

package remotecache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/share/s3"
	"github.com/seed-68981b69/slipway/solver"
)

// Imports are the caches that one build imports, in the order in which they were asked for. It implements solver.Imports; its methods may be
// called concurrently.
type Imports struct {
	caches  *Caches
	session Session
	ctx     context.Context
	cancel  context.CancelCauseFunc
	group   sync.WaitGroup

	mu      sync.Mutex // guards list
	list    []*imported
	leaving []func()
}

// imported is one cache.
type imported struct {
	spec   ImportSpec
	opened chan struct{}
	im     *share.Import // nil if it could not be opened
	err    error         // why
	// warn tells the build about trouble.
	warn   func(string)
	failed sync.Once
	mu     sync.Mutex // guards dead
	dead   bool
}

// errNotNeeded is why an import ends when its build does.
var errNotNeeded = errors.New("the build has ended")

var (
	_ solver.Imports     = (*Imports)(nil)
	_ solver.MountSource = (*Imports)(nil)
)

// NewImports returns the imports of a build, none yet. Close it.
func (c *Caches) NewImports(ctx context.Context, session Session) *Imports {
	i := &Imports{caches: c, session: session}
	i.ctx, i.cancel = context.WithCancelCause(ctx)
	return i
}

// Add begins to import more, each shown as a step. What is imported already is left out. It does not wait; what cannot be imported is no
// failure of the build.
func (i *Imports) Add(specs []ImportSpec, step Step) {
	i.mu.Lock()
	defer i.mu.Unlock()
next:
	for _, spec := range specs {
		for _, old := range i.list {
			if old.spec.key() == spec.key() {
				continue next
			}
		}
		one := &imported{spec: spec, opened: make(chan struct{}), warn: func(string) {}}
		i.list = append(i.list, one)
		i.group.Go(func() {
			defer close(one.opened)
			id := digest.FromString("import cache " + spec.key())
			err := step(i.ctx, "importing cache manifest from "+spec.String(), id, func(env *solver.Env) error {
				one.warn = env.Progress.Warn
				err := i.open(one)
				one.err = err
				if errors.Is(context.Cause(i.ctx), errNotNeeded) {
					env.Progress.Log(1, []byte("not needed: the build has found everything here\n"))
					return nil
				}
				return err
			})
			if err != nil && i.ctx.Err() == nil {
				one.warn(fmt.Sprintf("cache %s is not used: %v", spec, err))
			}
		})
	}
}

// open reads the document.
func (i *Imports) open(one *imported) error {
	c, spec := i.caches, one.spec
	opts := share.ImportOptions{Title: spec.String(), Layers: c.deps.Layers, Key: solver.Key}
	switch spec.Type {
	case TypeRegistry:
		repository, err := c.repository(i.session, spec.Ref, spec.Insecure)
		if err != nil {
			return err
		}
		opts.Backend, opts.Name = repository, spec.Ref
		place := registryPlace(spec.Ref, spec.Insecure)
		opts.Origin = func(l share.Layer) string {
			if l.Blob == nil || l.Chunks != nil || spec.Insecure {
				return place.origin(l)
			}
			return registry.Origin{Ref: spec.Ref, Desc: *l.Blob}.String()
		}
		opts.Used = func(layers []share.Layer) { c.noteSources(spec.Ref, layers) }
	case TypeLocal:
		store, err := contentStore(i.ctx, i.session, spec.Dir)
		if err != nil {
			return err
		}
		content := share.OpenContent(store, spec.Digest)
		opts.Backend, opts.Name = content, ""
		place := place{Local: spec.Dir}
		opts.Origin = place.origin
		i.leave(c.open.enter(place, content))
	case TypeS3:
		bucket, err := s3.New(spec.Bucket)
		if err != nil {
			return err
		}
		opts.Backend, opts.Name = bucket, spec.Name
		place := bucketPlace(spec.Bucket)
		opts.Origin = place.origin
		leave := c.open.enter(place, bucket)
		i.leave(func() { leave(); _ = bucket.Close() })
	}
	im, err := share.OpenImport(i.ctx, opts)
	if repository, ok := opts.Backend.(*share.Repository); ok && errors.Is(err, share.ErrNoCache) {
		var document []byte
		if document, err = repository.InlineDocument(i.ctx); err == nil {
			im, err = share.NewImport(opts, document)
		}
	}
	if err != nil {
		return hint(err)
	}
	if n := im.Ignored(); n > 0 {
		one.warn(fmt.Sprintf("cache %s: %d records do not fit and are ignored", spec, n))
	}
	one.im = im
	return nil
}

// leave has f called at the end.
func (i *Imports) leave(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.leaving = append(i.leaving, f)
}

// Get implements solver.Imports. It waits for what is being opened.
func (i *Imports) Get(ctx context.Context, key string) (*record.Record, bool) {
	i.mu.Lock()
	list := i.list
	i.mu.Unlock()
	for _, one := range list {
		select {
		case <-one.opened:
		case <-ctx.Done():
			return nil, false
		}
		if one.im == nil || one.isDead() {
			continue
		}
		rec, ok, err := one.im.Get(ctx, key)
		if err != nil && ctx.Err() == nil {
			one.die(err)
		}
		if ok && err == nil {
			return rec, true
		}
	}
	return nil, false
}

// RestoreMount implements solver.MountSource: the first of the imports that has the mount gives it.
func (i *Imports) RestoreMount(ctx context.Context, id, from, dir string) (what string, ok bool, err error) {
	i.mu.Lock()
	list := i.list
	i.mu.Unlock()
	for _, one := range list {
		select {
		case <-one.opened:
		case <-ctx.Done():
			return "", false, context.Cause(ctx)
		}
		if one.im == nil {
			continue
		}
		if what, ok, err = one.im.RestoreMount(ctx, id, from, dir); ok || err != nil {
			return what, ok, err
		}
	}
	return "", false, nil
}

// Find is Get without the layers: nothing is fetched but the documents, and the record has no outputs.
func (i *Imports) Find(ctx context.Context, key string) (*record.Record, bool) {
	for _, one := range i.all(ctx) {
		if rec, ok := one.im.Find(key); ok {
			return rec, true
		}
	}
	return nil, false
}

// Take makes all records of the imports known to the engine, and returns how many they are. An import that could not be opened is an error here.
func (i *Imports) Take(ctx context.Context) (int, error) {
	n := 0
	var items []record.Item
	put := func() error {
		err := i.caches.deps.Records.PutBatch(ctx, items)
		n += len(items)
		items = nil
		return err
	}
	for _, one := range i.all(ctx) {
		for _, r := range one.im.Document().Records {
			rec, ok, err := one.im.Get(ctx, r.Key)
			if err != nil {
				return n, fmt.Errorf("import %s: %w", one.spec, err)
			}
			if !ok {
				continue // it does not fit
			}
			if items = append(items, record.Item{Record: rec, Keys: []string{r.Key}}); len(items) == 100 {
				if err := put(); err != nil {
					return n, err
				}
			}
		}
	}
	if err := put(); err != nil {
		return n, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, one := range i.list {
		if one.im == nil {
			return n, fmt.Errorf("cache %s cannot be imported: %w", one.spec, one.err)
		}
	}
	return n, nil
}

// all are the imports that could be opened.
func (i *Imports) all(ctx context.Context) []*imported {
	i.mu.Lock()
	list := slices.Clone(i.list)
	i.mu.Unlock()
	return slices.DeleteFunc(list, func(one *imported) bool {
		select {
		case <-one.opened:
			return one.im == nil
		case <-ctx.Done():
			return true
		}
	})
}

// isDead says that asking any further would only cost time.
func (one *imported) isDead() bool {
	one.mu.Lock()
	defer one.mu.Unlock()
	return one.dead
}

func (one *imported) die(err error) {
	one.mu.Lock()
	one.dead = !isAboutOneBlob(err)
	one.mu.Unlock()
	one.failed.Do(func() {
		one.warn(fmt.Sprintf("cache %s: a part of it cannot be used: %v", one.spec, err))
		slog.Debug("imported cache", "cache", one.spec.String(), "error", err)
	})
}

// directory returns the manifest that has been imported from a directory of the client, if any: an export to it goes on with that.
func (i *Imports) directory(dir string) digest.Digest {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, one := range i.list {
		if one.spec.Type == TypeLocal && one.spec.Dir == dir {
			return one.spec.Digest
		}
	}
	return ""
}

// Close waits until nothing is being imported any more. Layers that have not been fetched by then are fetched by later builds with what
// they know.
func (i *Imports) Close() {
	i.cancel(errNotNeeded)
	i.group.Wait()
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, f := range i.leaving {
		f()
	}
	i.leaving = nil
}
