// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"sync"
)

// Access is what a user may do with registries, carried by the context of what is done for that user: layers that are elsewhere
// are fetched deep inside, by whoever first needs their bytes, and must not be fetched with anybody else's rights.
type Access struct {
	credentials Credentials
	tokens      TokenSource

	mu  sync.Mutex // guards what follows
	of  *Registry
	reg *Registry
}

type accessKey struct{}

// WithAccess returns a context that carries what a client has: its credentials and, unless nil, its own tokens. Both may be nil:
// that is a user without any.
func WithAccess(ctx context.Context, creds Credentials, tokens TokenSource) context.Context {
	return context.WithValue(ctx, accessKey{}, &Access{credentials: creds, tokens: tokens})
}

// For returns r with the access that ctx carries: r itself if it carries none. What is returned for one context shares its tokens.
func (r *Registry) For(ctx context.Context) *Registry {
	a, ok := ctx.Value(accessKey{}).(*Access)
	if !ok {
		return r
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.of != r {
		a.of, a.reg = r, r.WithTokens(a.credentials, a.tokens)
	}
	return a.reg
}

// Progress is called with the bytes of a blob that have come, by its digest, and last with done. It may be called from several
// goroutines. solver.Progress.Status is one.
type Progress func(id string, current, total int64, done bool)

type progressKey struct{}

// WithProgress returns a context whose downloads are reported to fn.
func WithProgress(ctx context.Context, fn Progress) context.Context {
	return context.WithValue(ctx, progressKey{}, fn)
}

// ProgressOf returns the function that ctx carries, or one that does nothing.
func ProgressOf(ctx context.Context) Progress {
	if fn, ok := ctx.Value(progressKey{}).(Progress); ok && fn != nil {
		return fn
	}
	return func(string, int64, int64, bool) {}
}
