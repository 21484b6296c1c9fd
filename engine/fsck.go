// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/engine/dockerapi"
	"github.com/seed-68981b69/slipway/solver/op"
)

// Check checks a state directory that no engine has open, with all that is in it: the store, cache mounts, volumes, and what the
// build history names. See cache.Store.Check.
func Check(ctx context.Context, root string, opt cache.CheckOptions) ([]cache.Problem, error) {
	store, err := cache.Open(ctx, root)
	if err != nil {
		return nil, err
	}
	e := &Engine{root: store.Dir}
	store.AddSource(op.NewCacheMounts(e.path("mounts")))
	store.AddSource(dockerapi.VolumeCheck{Dir: e.path("volumes")})
	problems, err := store.Check(ctx, opt)
	if closeErr := store.Close(); err == nil {
		err = closeErr
	}
	return problems, err
}
