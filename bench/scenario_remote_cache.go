// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// What a fresh CI machine pays: the state is empty, the registry has what an earlier build of the same service has left (mode=max, and with
// slipway the cache mounts), and the image is pushed.

var remoteNoop = &scenario{
	name: "remote-cache",
	about: "The Go service on an empty store, nothing changed: everything is in the cache of a registry on loopback (mode=max), and the image is " +
		"pushed to a registry that has it. The goal is a fifth of BuildKit's time.",
	goal:       5,
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, goMount) },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) { return remoteCaching(ctx, b, p) },
}

var remoteChange = &scenario{
	name: "remote-cache-change",
	about: "The same after a change in one line. The compiler runs; with slipway its cache has come along (mounts=all), with BuildKit, which cannot do " +
		"that, it is empty. The goal is half of BuildKit's time.",
	floorAbout: "the compiler alone, with its cache",
	goal:       2,
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, goMount) },
	round:      func(b *bench, n int) error { return b.changeGo(n) },
	floor:      func(_ context.Context, b *bench) error { return b.compile(filepath.Join(b.dir, "gocache")) },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) { return remoteCaching(ctx, b, p) },
}

// remoteCaching makes a peer ready that begins every run with an empty state and a registry in which another machine of its kind has left a
// cache and the image.
func remoteCaching(ctx context.Context, b *bench, p peer) (_ *contestant, err error) {
	ap, ok := p.(archiver)
	if !ok {
		return nil, nil
	}
	b.states++
	dir := filepath.Join(b.dir, fmt.Sprint("registry-", b.states))
	to, err := startRegistry(dir)
	if err != nil {
		return nil, err
	}
	one := b.goBuild()
	one.tag = ""
	one.output = "type=image,name=" + to.host + "/bench/app,push=true"
	one.cacheFrom = "type=registry,ref=" + to.host + "/bench/cache"

	first := one
	first.cacheFrom, first.cacheTo = "", one.cacheFrom+",mode=max"
	if _, ours := p.(*slipway); ours {
		first.cacheTo += ",mounts=all"
	}
	o, err := ap.open(ctx, b.stateDir(p.name()), 0)
	if err == nil {
		err = errors.Join(runQuietly(ctx, o.build(first)), o.close())
	}
	if err != nil {
		return nil, errors.Join(err, to.close())
	}
	c, err := coldBuildingOf(func(*bench) build { return one })(ctx, b, p)
	if err != nil {
		return nil, errors.Join(err, to.close())
	}
	end := c.close
	c.close = func() error { return errors.Join(end(), to.close()) }
	return c, nil
}
