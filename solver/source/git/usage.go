// SPDX-License-Identifier: Apache-2.0

package git

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/seed-68981b69/slipway/cache"
)

// Repositories are the bare repositories that sources fetch into, a directory for each remote, used by one checkout at a
// time. They are a cache.Source: they take room, and can be fetched again. Their methods may be called concurrently.
type Repositories struct {
	dir   string
	mu    sync.Mutex // guards what follows
	locks map[string]repoLock
}

// repoLock is full while somebody uses a repository.
type repoLock chan struct{}

func (l repoLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (l repoLock) tryLock() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l repoLock) unlock() { <-l }

var _ cache.Source = (*Repositories)(nil)

// remoteFile in a bare repository names its remote, without user and password, and its time is that of the last use.
const remoteFile = "slipway-remote"

// knownHostsPrefix begins the names of files that a git command reads while it runs.
const knownHostsPrefix = "known-hosts-"

// NewRepositories keeps repositories in dir, which is made when it is needed. Files that a process that was killed has left there are removed.
func NewRepositories(dir string) *Repositories {
	left, _ := filepath.Glob(filepath.Join(dir, knownHostsPrefix+"*"))
	for _, file := range left {
		_ = os.Remove(file) // it is tried again the next time
	}
	return &Repositories{dir: dir, locks: map[string]repoLock{}}
}

// temp makes a file beside the repositories, for its owner alone.
func (r *Repositories) temp(prefix string) (*os.File, error) {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return nil, err
	}
	return os.CreateTemp(r.dir, prefix)
}

// of returns the lock of a directory.
func (r *Repositories) of(name string) repoLock {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.locks[name] == nil {
		r.locks[name] = make(repoLock, 1)
	}
	return r.locks[name]
}

// noteUse says that a repository has been used now. Trouble costs that it is thought older than it is.
func noteUse(bare, remote string) {
	if _, err := os.Stat(bare); err == nil {
		_ = os.WriteFile(filepath.Join(bare, remoteFile), []byte(redactUser(remote)), 0o600)
	}
}

// Usage implements cache.Source.
func (r *Repositories) Usage(ctx context.Context) ([]cache.Usage, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("git repositories: %w", err)
	}
	var list []cache.Usage
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		bare := filepath.Join(r.dir, e.Name())
		size, err := cache.DirUsage(ctx, bare)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("git repositories: %w", err)
		}
		u := cache.Usage{ID: usageID(e.Name()), Type: cache.TypeRegular, Description: "git repository", Mutable: true, InUse: true, Size: size}
		if lock := r.of(e.Name()); lock.tryLock() {
			u.InUse = false
			lock.unlock()
		}
		if remote, err := os.ReadFile(filepath.Join(bare, remoteFile)); err == nil {
			u.Description += " of " + string(remote)
		}
		if st, err := os.Stat(filepath.Join(bare, remoteFile)); err == nil {
			u.LastUsed = st.ModTime()
		} else if info, err := e.Info(); err == nil {
			u.LastUsed = info.ModTime()
		}
		u.Created = u.LastUsed
		list = append(list, u)
	}
	return list, nil
}

func usageID(name string) string { return "git-" + name }

// Remove implements cache.Source.
func (r *Repositories) Remove(ctx context.Context, id string) (bool, error) {
	name := filepath.Base(id)
	if len(name) < 5 || usageID(name[4:]) != id {
		return false, fmt.Errorf("git repository %q: no such ID", id)
	}
	lock := r.of(name[4:])
	if !lock.tryLock() {
		return false, nil
	}
	defer lock.unlock()
	if err := os.RemoveAll(filepath.Join(r.dir, name[4:])); err != nil {
		return false, fmt.Errorf("delete git repository: %w", err)
	}
	return true, nil
}
