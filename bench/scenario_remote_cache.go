// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/share"
)

// What a fresh CI machine pays: the state is empty, the registry has what an earlier build of the same project has left (mode=max, and with
// slipway the cache mounts), and the image is pushed.

var remoteNoop = &scenario{
	name: "remote-cache",
	about: "The Go service on an empty store, nothing changed: everything is in the cache of a registry on loopback (mode=max), and the image is " +
		"pushed to a registry that has it. The goal is a fifth of BuildKit's time, and 1.1 × the bytes of the cache's index and of what the push needs.",
	goal:    5,
	goals:   []goal{numberWithin(remoteBytes, "× what it must", 1.1)},
	prepare: func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, goMount) },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		return remoteCaching(ctx, b, p, remote{one: b.goBuild()})
	},
}

var remoteChange = &scenario{
	name: "remote-cache-change",
	about: "The same after a change in one line. The compiler runs; with slipway its cache has come along (mounts=all), with BuildKit, which cannot do " +
		"that, it is empty. The goal is half of BuildKit's time, and that what a second export sends after such a change is at most 5 % of the first.",
	floorAbout: "the compiler alone, with its cache",
	goal:       2,
	goals:      []goal{numberWithin(secondExport, "% of the first", 5)},
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, goMount) },
	round:      func(b *bench, n int) error { return b.changeGo(n) },
	floor:      func(_ context.Context, b *bench) error { return b.compile(filepath.Join(b.dir, "gocache")) },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		return remoteCaching(ctx, b, p, remote{one: b.goBuild(), change: func() error { return b.changeGo(1000) }})
	},
}

// Names of numbers.
const (
	remoteBytes  = "bytes transferred"
	secondExport = "a second export's bytes"
)

// remote is a project whose cache is in a registry.
type remote struct {
	one build
	// change changes one line, for a second export; nil when the runs change nothing, and what they transfer is compared with what they must.
	change func() error
}

// remoteCaching makes a peer ready that begins every run with an empty state and a registry in which another machine of its kind has left a
// cache and the image.
func remoteCaching(ctx context.Context, b *bench, p peer, what remote) (_ *contestant, err error) {
	ap, ok := p.(archiver)
	if !ok {
		return nil, nil
	}
	b.states++
	to, err := startRegistry(filepath.Join(b.dir, fmt.Sprint("registry-", b.states)))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, to.close())
		}
	}()
	one := what.one
	one.tag = ""
	one.output = "type=image,name=" + to.host + "/bench/app,push=true"
	one.cacheFrom = "type=registry,ref=" + to.host + "/bench/cache"
	cacheTo := one.cacheFrom + ",mode=max"
	_, ours := p.(*slipway)
	if ours {
		cacheTo += ",mounts=all"
	}
	export := func(one build) (sent int64, err error) {
		o, err := ap.open(ctx, b.stateDir(p.name()), 0)
		if err != nil {
			return 0, err
		}
		one.cacheTo = cacheTo
		before := to.received.Load()
		err = runQuietly(ctx, o.build(one))
		return to.received.Load() - before, errors.Join(err, o.close())
	}
	first := one
	first.cacheFrom = ""
	firstSent, err := export(first)
	if err != nil {
		return nil, err
	}
	c, err := coldBuildingOf(func(*bench) build { return one })(ctx, b, p)
	if err != nil {
		return nil, err
	}
	note, run, end, runs, bodies := "", c.run, c.close, 0, int64(0)
	c.run = func(ctx context.Context, calls *calls) error {
		before := to.received.Load() + to.sent.Load()
		err := run(ctx, calls)
		runs, bodies = runs+1, bodies+to.received.Load()+to.sent.Load()-before
		return err
	}
	numbers := map[string]float64{}
	c.note = func() string { return note }
	c.numbers = func() map[string]float64 { return numbers }
	c.close = func() error {
		err := end()
		switch {
		case err != nil || !ours || runs == 0:
		case what.change == nil:
			var index int64
			if index, err = to.cacheIndex(ctx, "bench/cache"); err == nil {
				each := float64(bodies) / float64(runs)
				numbers[remoteBytes] = each / float64(index)
				note = fmt.Sprintf("%.1f kB of bodies a run; the cache's manifest, document and tables of contents are %.1f kB, and the push needs nothing: %.2f × (goal: at most 1.1).",
					each/1e3, float64(index)/1e3, each/float64(index))
			}
		default:
			if err = what.change(); err != nil {
				break
			}
			var sent int64
			if sent, err = export(one); err == nil {
				numbers[secondExport] = 100 * float64(sent) / float64(firstSent)
				note = fmt.Sprintf("the first export and push send %.2f MB, those after a change in one line %.2f MB: %.1f %% (goal: at most 5).",
					float64(firstSent)/1e6, float64(sent)/1e6, 100*float64(sent)/float64(firstSent))
			}
		}
		return errors.Join(err, to.close())
	}
	return c, nil
}

// cacheIndex is how many bytes a cache of ours has besides layers and packs: all that whoever asks it for keys may need.
func (r *plainRegistry) cacheIndex(ctx context.Context, repository string) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.host+"/v2/"+repository+"/manifests/latest", nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var m ocispec.Manifest
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
		return 0, fmt.Errorf("manifest of the cache: %w", err)
	}
	size := resp.ContentLength
	for _, l := range m.Layers {
		if l.MediaType == share.MediaTypeDocument || strings.HasPrefix(l.MediaType, share.MediaTypeIndex) {
			size += l.Size
		}
	}
	return size, nil
}
