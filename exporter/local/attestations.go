// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/attestation"
)

// attested adds to the files of a platform what is said about them: a file for each statement, whose subjects are the files. byName
// puts the platform into the names, for where the files of several platforms come together.
func attested(ctx context.Context, p *part, ref exporter.Ref, o Options, byName bool) (fsutil.FS, error) {
	wanted := slices.DeleteFunc(slices.Clone(ref.Attestations), func(a exporter.Attestation) bool { return a.InlineOnly })
	if len(wanted) == 0 {
		return p, nil
	}
	subjects, err := p.subjects(ctx)
	if err != nil {
		return nil, err
	}
	modTime := time.Now().Truncate(time.Second)
	if p.epoch != nil {
		modTime = *p.epoch
	}
	statements := staticfs.NewFS()
	taken := map[string]bool{}
	for _, a := range wanted {
		name := o.AttestationPrefix + path.Base(a.Path)
		if byName {
			ext := path.Ext(name)
			name = strings.TrimSuffix(name, ext) + "." + PlatformDir(ref.ID) + ext
		}
		if name == "." || name == ".." || strings.Contains(name, "/") {
			return nil, fmt.Errorf("attestation %q: not the name of a file", a.Path)
		}
		if _, ok := p.files.Lookup(p.path(name)); ok || taken[name] {
			return nil, fmt.Errorf("attestation %s: there is a file of that name already: set attestation-prefix", name)
		}
		taken[name] = true
		predicate, err := a.Predicate(ctx, nil)
		if err != nil {
			return nil, fmt.Errorf("attestation %s: %w", a.Path, err)
		}
		statement, err := attestation.NewStatement(a, predicate, subjects)
		if err != nil {
			return nil, err
		}
		data, err := json.MarshalIndent(statement, "", "  ")
		if err != nil {
			return nil, fmt.Errorf("attestation %s: %w", a.Path, err)
		}
		statements.Add(name, &types.Stat{Mode: 0o600, ModTime: modTime.UnixNano()}, data)
	}
	return staticfs.NewMergeFS(p, statements), nil
}

// subjects are the regular files of the part. Their digests are in the index: nothing is read.
func (p *part) subjects(ctx context.Context) ([]attestation.Subject, error) {
	var out []attestation.Subject
	err := p.walk(p.root, func(e index.Entry) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if e.Type == index.File {
			out = append(out, attestation.Subject{Name: p.name(e.Path), Digest: e.Digest})
		}
		return nil
	})
	return out, err
}
