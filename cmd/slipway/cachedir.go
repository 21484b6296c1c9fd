// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"slices"
	"sync"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// cacheDirs are locks on the directories of local caches. BuildKit's client reads index.json before it sends its request and writes it when the
// answer has come; each time it gives up, and fails the build, if another process is just doing so. Here we wait for each other.
// What cannot be locked (it is not there yet, or the file system cannot) is left to that client.
type cacheDirs struct {
	mu     sync.Mutex // guards locked
	locked []*os.File
}

// read locks the directories that are about to be imported, until the request is sent.
func (d *cacheDirs) read(imports []bkclient.CacheOptionsEntry) {
	var dirs []string
	for _, im := range imports {
		if im.Type == "local" {
			dirs = append(dirs, im.Attrs["src"])
		}
	}
	d.lock(unix.LOCK_SH, dirs)
}

// intercept is a grpc.UnaryClientInterceptor. After the answer to a build it locks the directories that were exported to.
func (d *cacheDirs) intercept(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	solve, ok := req.(*controlapi.SolveRequest)
	if !ok {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	d.release()
	err := invoke(ctx, method, req, reply, conn, opts...)
	if err == nil {
		var dirs []string
		for _, ex := range solve.GetCache().GetExports() {
			if ex.GetType() == "local" {
				dirs = append(dirs, ex.GetAttrs()["dest"])
			}
		}
		d.lock(unix.LOCK_EX, dirs)
	}
	return err
}

func (d *cacheDirs) lock(how int, dirs []string) {
	slices.Sort(dirs) // in the same order everywhere
	for _, dir := range slices.Compact(dirs) {
		f, err := os.Open(dir)
		if err != nil {
			continue
		}
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Flock(int(f.Fd()), how)
		}
		if err != nil {
			_ = f.Close()
			continue
		}
		d.mu.Lock()
		d.locked = append(d.locked, f)
		d.mu.Unlock()
	}
}

// release ends all locks.
func (d *cacheDirs) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.locked {
		_ = f.Close()
	}
	d.locked = nil
}
