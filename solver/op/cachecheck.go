// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/seed-68981b69/slipway/cache"
)

var _ cache.Checker = (*CacheMounts)(nil)

// Check implements cache.Checker. What steps have written to a cache mount nobody can judge, but what keeps account of it: a mount
// whose mount.json is lost is in no list and never deleted. Half-made copies are left over.
func (c *CacheMounts) Check(ctx context.Context, repair bool) ([]cache.Problem, error) {
	tops, err := os.ReadDir(c.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cache mounts: %w", err)
	}
	var found []cache.Problem
	take := func(p cache.Problem, path string) error {
		if repair {
			p.Repair = cache.RepairRemoved
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("cache mounts: %w", err)
			}
		}
		found = append(found, p)
		return nil
	}
	for _, top := range tops {
		if ctx.Err() != nil {
			return found, context.Cause(ctx)
		}
		if top.Name() == trashDir {
			continue
		}
		path := filepath.Join(c.dir, top.Name())
		info, err := readCacheMount(path)
		if err != nil {
			if err := take(cache.Problem{Kind: cache.ProblemCacheMount, Name: top.Name(), Part: "mount.json", Detail: err.Error()}, path); err != nil {
				return found, err
			}
			continue
		}
		if err := checkCopies(path, info, take); err != nil {
			return found, err
		}
	}
	return found, nil
}

// readCacheMount reads what a directory of copies is for.
func readCacheMount(path string) (info cacheMountInfo, err error) {
	b, err := os.ReadFile(filepath.Join(path, "mount.json"))
	if err == nil {
		err = json.Unmarshal(b, &info)
	}
	if err == nil && info.key() != filepath.Base(path) {
		err = fmt.Errorf("it is about cache mount %q, whose directory is %s", info.ID, info.key())
	}
	return info, err
}

// checkCopies looks at what is beside mount.json.
func checkCopies(path string, info cacheMountInfo, take func(cache.Problem, string) error) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return fmt.Errorf("cache mounts: %w", err)
	}
	for _, e := range entries {
		at := filepath.Join(path, e.Name())
		name, isUse := strings.CutSuffix(e.Name(), ".json")
		_, err := strconv.Atoi(name)
		switch {
		case e.Name() == "mount.json", err == nil && e.IsDir() && !isUse:
			continue
		case err == nil && isUse:
			var use cacheUse
			b, err := os.ReadFile(at)
			if err == nil {
				err = json.Unmarshal(b, &use)
			}
			if err == nil {
				continue
			}
			// Without it the copy is as old as its directory.
			if err := take(cache.Problem{Kind: cache.ProblemCacheMount, Name: info.ID, Part: e.Name(), Detail: err.Error()}, at); err != nil {
				return err
			}
		default:
			if err := take(cache.Problem{Kind: cache.ProblemOrphan, Name: at, Detail: "nothing of cache mount " + info.ID + " is called so"}, at); err != nil {
				return err
			}
		}
	}
	return nil
}
