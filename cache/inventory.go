// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/blob"
	"github.com/seed-68981b69/slipway/cache/image"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// packedBucket of the record database has, for a layer's diff ID and a compression, the blob that is its packed form.
const packedBucket = "blobs"

// stocktaking is an inventory in the making.
type stocktaking struct {
	inventory
	s       *Store
	horizon uint64

	layers  map[layer.ID]int // index in pieces
	blobs   map[digest.Digest]int
	results map[string]int // index in units, by what makes results the same
	tree    *stackTree
}

// takeInventory reads what there is, what names what, and what has been used since horizon.
func (s *Store) takeInventory(ctx context.Context, horizon uint64) (*inventory, error) {
	st := &stocktaking{
		s: s, horizon: horizon, layers: map[layer.ID]int{}, blobs: map[digest.Digest]int{}, results: map[string]int{}, tree: newStackTree(),
	}
	// The order matters to builds that go on meanwhile: what they name is there before the name, so things come first; a
	// name that comes later is of something whose use is noted.
	for _, step := range []func(context.Context) error{
		st.takeBlobs, st.takeLayers, st.takeImages, st.takeKept, st.takeRecords, st.takeFailed, st.takeSources,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	st.relate()
	return &st.inventory, nil
}

func (st *stocktaking) takeBlobs(context.Context) error {
	return st.s.Blobs.Walk(func(d digest.Digest, size int64) error {
		st.blobs[d] = len(st.pieces)
		st.pieces = append(st.pieces, piece{blob: d, bytes: st.s.blobUsage(d, size), used: st.s.uses.blob(d, st.horizon)})
		return nil
	})
}

// blobUsage is what a blob takes on disk. A tar that a layer shares is counted there.
func (s *Store) blobUsage(d digest.Digest, size int64) int64 {
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(s.Blobs.Dir(), "blobs", string(d.Algorithm()), d.Encoded()), &st); err != nil {
		return size
	}
	if st.Nlink > 1 {
		return 0
	}
	return st.Blocks * 512
}

func (st *stocktaking) takeLayers(ctx context.Context) error {
	byDiffID := map[digest.Digest][]int{}
	var remote []layer.Info
	mounted := st.s.Snapshots.InUse()
	err := st.s.Layers.Walk(ctx, func(l layer.Info) error {
		if l.Form == layer.FormHeld {
			return nil // in memory: DropHeld
		}
		st.layers[l.ID] = len(st.pieces)
		if l.Form == layer.FormRemote {
			remote = append(remote, l)
		}
		if l.DiffID != "" {
			byDiffID[l.DiffID] = append(byDiffID[l.DiffID], len(st.pieces))
		}
		st.pieces = append(st.pieces, piece{
			layer: l.ID, bytes: l.Size, used: mounted[l.ID] || st.s.uses.layer(l.ID, st.horizon),
		})
		return nil
	})
	if err != nil {
		return err
	}
	for _, l := range remote {
		below, _ := st.stack(l.Where.Below)
		p := &st.pieces[st.layers[l.ID]]
		p.packed = append(p.packed, below...)
	}
	pack := func(diffID, blob digest.Digest) {
		if b, ok := st.blobs[blob]; ok {
			for _, l := range byDiffID[diffID] {
				if p := &st.pieces[l]; !slices.Contains(p.packed, b) {
					p.packed = append(p.packed, b)
				}
			}
		}
	}
	for diffID := range byDiffID {
		pack(diffID, diffID)
	}
	return st.s.Records.WalkValues(packedBucket, func(key string, value []byte) error {
		for _, diffID := range findDigests([]byte(key)) {
			for _, blob := range findDigests(value) {
				pack(diffID, blob)
			}
		}
		return nil
	})
}

func (st *stocktaking) takeImages(ctx context.Context) error {
	images, err := st.s.Images.List(ctx)
	if err != nil {
		return err
	}
	byTarget := map[digest.Digest]int{}
	for _, m := range images {
		if i, ok := byTarget[m.Target.Digest]; ok {
			st.images[i].Description += " " + image.Familiar(m.Name)
			continue
		}
		byTarget[m.Target.Digest] = len(st.images)
		u := unit{Usage: Usage{
			ID: "image-" + m.ID.Encoded()[:12] + "-" + m.Target.Digest.Encoded()[:12], Type: TypeInternal, InUse: true, Shared: true,
			Description: "image " + image.Familiar(m.Name), Created: m.Created,
		}}
		if m.Name == "" {
			u.Description = "image without a name"
		}
		u.blobs = st.find(m.Target.Digest)
		for _, man := range m.Manifests {
			u.blobs = append(u.blobs, st.find(man.Target.Digest, man.Config)...)
			layers, err := st.s.manifestLayers(man.Target.Digest)
			if err != nil {
				return err
			}
			u.blobs = append(u.blobs, st.find(layers...)...)
			snap, _, err := st.s.Images.Layers(ctx, man.Target.Digest)
			if err != nil {
				return err
			}
			stack, _ := st.stack(snap)
			u.stacks = append(u.stacks, stack)
		}
		for _, p := range u.pieces() {
			st.pieces[p].image = true
			for _, packed := range st.pieces[p].packed {
				st.pieces[packed].image = true
			}
		}
		st.images = append(st.images, u)
	}
	return nil
}

// find returns the pieces of those blobs that are there.
func (st *stocktaking) find(ds ...digest.Digest) []int {
	var pieces []int
	for _, d := range ds {
		if i, ok := st.blobs[d]; ok {
			pieces = append(pieces, i)
		}
	}
	return pieces
}

// stack returns the pieces of a snapshot, and whether all of its layers are there.
func (st *stocktaking) stack(snap snapshot.Snapshot) ([]int, bool) {
	stack, whole := make([]int, 0, len(snap)), true
	for _, id := range snap {
		if i, ok := st.layers[id]; ok {
			stack = append(stack, i)
		} else {
			whole = false
		}
	}
	return stack, whole
}

func (st *stocktaking) takeRecords(ctx context.Context) error {
	return st.s.Records.Walk(ctx, func(key string, rec *record.Record) error {
		same := sameResult(rec)
		i, ok := st.results[same]
		if !ok {
			i = len(st.units)
			st.results[same] = i
			st.units = append(st.units, st.newResult(same, rec))
		}
		u := &st.units[i]
		u.keys = append(u.keys, key)
		if rec.Created.Before(u.Created) {
			u.Created = rec.Created
			u.Description = cmp.Or(description(rec), u.Description)
		}
		if rec.LastUsed.After(u.LastUsed) {
			u.LastUsed = rec.LastUsed
		}
		u.UsageCount += rec.Uses
		u.InUse = u.InUse || st.s.uses.record(key, st.horizon)
		u.blobs = append(u.blobs, st.find(rec.Log)...)
		for _, part := range rec.Parts { // what was downloaded for a source is named by its pin
			u.blobs = append(u.blobs, st.find(digest.Digest(part.Value))...)
		}
		return nil
	})
}

// newResult is the thing that rec and all records of the same result are.
func (st *stocktaking) newResult(same string, rec *record.Record) unit {
	sum := sha256.Sum256([]byte(same))
	u := unit{Usage: Usage{
		ID: hex.EncodeToString(sum[:])[:25], Type: usageType(rec), Description: description(rec), Created: rec.Created, LastUsed: rec.LastUsed,
	}}
	layers, shared := 0, true
	for _, snap := range rec.Outputs {
		stack, whole := st.stack(snap)
		u.stacks = append(u.stacks, stack)
		u.broken = u.broken || !whole
		layers += len(stack)
		for _, p := range stack {
			shared = shared && st.pieces[p].image
		}
		if len(stack) > 0 && st.pieces[stack[len(stack)-1]].used {
			u.InUse = true
		}
	}
	u.Shared = shared && layers > 0
	return u
}

// sameResult is equal for the records that one thing consists of: those of one step with equal results, under however
// many keys.
func sameResult(rec *record.Record) string {
	var b strings.Builder
	b.WriteString(bareName(rec.Step.Name))
	for _, snap := range rec.Outputs {
		b.WriteByte(0)
		for _, id := range snap {
			b.WriteString(string(id))
			b.WriteByte(',')
		}
	}
	return b.String()
}

// bareName is a step's name without its place in a Dockerfile, "[build 2/3]".
func bareName(name string) string {
	if strings.HasPrefix(name, "[") {
		if i := strings.Index(name, "] "); i > 0 {
			return name[i+2:]
		}
	}
	return name
}

func description(rec *record.Record) string {
	if rec.Step.Name != "" {
		return rec.Step.Name
	}
	if op := opOf(rec); op != "" {
		return op
	}
	return "unnamed step"
}

// opOf is the kind of the op whose work rec is: ops say so in the first part of their keys.
func opOf(rec *record.Record) string {
	if len(rec.Parts) > 0 && rec.Parts[0].Name == "op" {
		return rec.Parts[0].Value
	}
	return ""
}

func usageType(rec *record.Record) UsageType {
	if opOf(rec) == "git" {
		return TypeGit
	}
	return TypeRegular
}

func (st *stocktaking) takeSources(ctx context.Context) error {
	for i, src := range st.s.sources {
		list, err := src.Usage(ctx)
		if err != nil {
			return err
		}
		for _, u := range list {
			st.units = append(st.units, unit{Usage: u, source: i, bytes: u.Size})
		}
	}
	return nil
}

// relate finds out what lies on what: parents, and that a result is used with what lies on it. Then it shares out sizes.
func (st *stocktaking) relate() {
	slices.SortFunc(st.units, func(a, b unit) int { return cmp.Compare(a.ID, b.ID) })
	for i := range st.units {
		u := &st.units[i]
		slices.Sort(u.keys)
		slices.Sort(u.blobs)
		u.blobs = slices.Compact(u.blobs)
		for _, stack := range u.stacks {
			st.tree.add(stack, i, u.LastUsed)
		}
	}
	for i := range st.units {
		u := &st.units[i]
		parents := map[string]bool{}
		for _, stack := range u.stacks {
			used, below := st.tree.look(stack)
			if used.After(u.LastUsed) {
				u.LastUsed = used
			}
			if below >= 0 && below != i && !parents[st.units[below].ID] {
				parents[st.units[below].ID] = true
				u.Parents = append(u.Parents, st.units[below].ID)
			}
		}
	}
	// A layer belongs to the result that has made it: the first one with the shortest stack.
	order := make([]int, len(st.units))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := &st.units[a], &st.units[b]
		return cmp.Or(cmp.Compare(x.depth(), y.depth()), x.Created.Compare(y.Created), cmp.Compare(x.ID, y.ID))
	})
	counted := make([]bool, len(st.pieces))
	for _, i := range order {
		st.units[i].Size = st.units[i].bytes + st.count(st.units[i].pieces(), counted)
	}
	for i := range st.images {
		st.images[i].Size = st.count(st.images[i].pieces(), counted)
	}
	rest := unit{Usage: Usage{ID: "unnamed", Type: TypeInternal, Description: "what nothing names", InUse: true}}
	for i := range st.pieces {
		if !counted[i] {
			rest.Size += st.count([]int{i}, counted)
			rest.InUse = rest.InUse && st.pieces[i].used
		}
	}
	st.rest = rest.Usage
}

// count adds up the pieces that have not been counted.
func (st *stocktaking) count(pieces []int, counted []bool) int64 {
	var sum int64
	for _, i := range pieces {
		if counted[i] {
			continue
		}
		counted[i] = true
		sum += st.pieces[i].bytes + st.count(st.pieces[i].packed, counted)
	}
	return sum
}

// usage lists everything that takes room, or was made by a step.
func (inv *inventory) usage() []Usage {
	var list []Usage
	for _, u := range inv.units {
		list = append(list, u.Usage)
	}
	for _, u := range inv.images {
		if u.Size > 0 {
			list = append(list, u.Usage)
		}
	}
	if inv.rest.Size > 0 {
		list = append(list, inv.rest)
	}
	return list
}

// stackTree has stacks of layers by their beginnings.
type stackTree struct {
	next  map[[2]int]int // node and piece on top of it → node
	nodes []stackNode
}

type stackNode struct {
	unit int       // a thing whose stack this is; -1 when there is none
	used time.Time // when what lies above was used last
}

func newStackTree() *stackTree {
	return &stackTree{next: map[[2]int]int{}, nodes: []stackNode{{unit: -1}}}
}

func (t *stackTree) add(stack []int, unit int, used time.Time) {
	node := 0
	for _, p := range stack {
		if used.After(t.nodes[node].used) {
			t.nodes[node].used = used
		}
		next, ok := t.next[[2]int{node, p}]
		if !ok {
			next = len(t.nodes)
			t.nodes = append(t.nodes, stackNode{unit: -1})
			t.next[[2]int{node, p}] = next
		}
		node = next
	}
	if t.nodes[node].unit < 0 {
		t.nodes[node].unit = unit
	}
}

// look returns when anything that lies on a stack was used last, and the thing whose stack is the longest beginning
// of it, -1 if there is none.
func (t *stackTree) look(stack []int) (used time.Time, below int) {
	node, below := 0, -1
	for i, p := range stack {
		if i > 0 && t.nodes[node].unit >= 0 {
			below = t.nodes[node].unit
		}
		node = t.next[[2]int{node, p}]
	}
	if len(stack) == 0 {
		return time.Time{}, -1 // everything lies on nothing
	}
	return t.nodes[node].used, below
}

// manifestLayers returns the layers that a manifest lists. One that is missing or damaged lists nothing; an error says that it
// cannot be read now.
func (s *Store) manifestLayers(d digest.Digest) ([]digest.Digest, error) {
	raw, err := s.Blobs.ReadAll(d)
	switch {
	case errors.Is(err, blob.ErrNotFound), errors.Is(err, blob.ErrDigest), errors.Is(err, blob.ErrSize):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("manifest of an image: %w", err)
	}
	var man ocispec.Manifest
	if err := json.Unmarshal(raw, &man); err != nil {
		return nil, nil
	}
	var ds []digest.Digest
	for _, l := range man.Layers {
		ds = append(ds, l.Digest)
	}
	return ds, nil
}

var digestPattern = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`sha256:[0-9a-f]{64}`)
})

// findDigests returns the digests in b, whatever the form of the text around them.
func findDigests(b []byte) []digest.Digest {
	var ds []digest.Digest
	for _, m := range digestPattern().FindAll(b, -1) {
		ds = append(ds, digest.Digest(m))
	}
	return ds
}

// DirUsage is what a directory and all that is in it take on disk, in bytes; other file systems that are mounted there
// are not looked into. What vanishes meanwhile counts nothing.
func DirUsage(ctx context.Context, dir string) (int64, error) {
	var root unix.Stat_t
	if err := unix.Lstat(dir, &root); err != nil {
		return 0, &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	var sum int64
	linked := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return nil
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return nil
		}
		switch {
		case st.Dev != root.Dev && d.IsDir():
			return fs.SkipDir
		case st.Dev != root.Dev, st.Nlink > 1 && !d.IsDir() && linked[st.Ino]:
			return nil
		}
		linked[st.Ino] = true
		sum += st.Blocks * 512
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("measure %s: %w", dir, err)
	}
	return sum, nil
}
