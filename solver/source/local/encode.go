// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// The file of a directory: magic, the directory's path, the views, SHA-256 of all that. Numbers are varints, strings
// have their length in front. A tree is the number of its nodes and the nodes, each with what is below it. A device
// is written when it is another than the node's before.
const viewsMagic = "slipway context 1\n"

const (
	nodeSure = 1 << iota
	nodeDigest
	nodeXattrs
	nodeBelow
	nodeDevice
)

func encodeViews(path string, views []*view) []byte {
	w := encoder{buf: append(make([]byte, 0, 1<<20), viewsMagic...)}
	w.string(path)
	w.uint(uint64(len(views)))
	for _, v := range views {
		w.buf = append(w.buf, v.key[:]...)
		w.tree(v.tree)
	}
	sum := sha256.Sum256(w.buf)
	return append(w.buf, sum[:]...)
}

type encoder struct {
	buf []byte
	dev uint64
}

func (w *encoder) uint(v uint64) { w.buf = binary.AppendUvarint(w.buf, v) }

func (w *encoder) string(s string) {
	w.uint(uint64(len(s)))
	w.buf = append(w.buf, s...)
}

func (w *encoder) tree(t *tree) {
	w.uint(uint64(len(t.list())))
	for i := range t.list() {
		w.node(&t.nodes[i])
	}
}

func (w *encoder) node(n *node) {
	var sum []byte
	var flags byte
	if hash, ok := strings.CutPrefix(string(n.digest), "sha256:"); ok {
		if raw, err := hex.DecodeString(hash); err == nil && len(raw) == sha256.Size {
			sum = raw
			flags |= nodeDigest
		}
	}
	if n.sure && (sum != nil || n.typ != index.File) {
		flags |= nodeSure
	}
	if len(n.xattrs) > 0 {
		flags |= nodeXattrs
	}
	if n.below != nil {
		flags |= nodeBelow
	}
	if n.state != left && n.stat.dev != w.dev {
		flags |= nodeDevice
	}
	w.buf = append(w.buf, byte(n.state)<<4|byte(n.typ), flags)
	w.string(n.name)
	if n.state == left {
		return
	}
	if flags&nodeDevice != 0 {
		w.dev = n.stat.dev
		w.uint(n.stat.dev)
	}
	w.uint(n.stat.ino)
	w.uint(uint64(n.stat.mode))
	w.uint(uint64(n.stat.nlink))
	w.uint(uint64(n.stat.size))
	w.buf = binary.AppendVarint(w.buf, n.stat.mtime)
	w.buf = binary.AppendVarint(w.buf, n.stat.ctime)
	if n.typ == index.Symlink {
		w.string(n.target)
	}
	w.buf = append(w.buf, sum...)
	if flags&nodeXattrs != 0 {
		w.uint(uint64(len(n.xattrs)))
		for _, k := range slices.Sorted(maps.Keys(n.xattrs)) {
			w.string(k)
			w.string(n.xattrs[k])
		}
	}
	if flags&nodeBelow != 0 {
		w.tree(n.below)
	}
}

// decodeViews reads what encodeViews has written for the directory at path. Whatever the bytes, it neither panics nor
// allocates more than a small multiple of their number.
func decodeViews(b []byte, path string) ([]*view, error) {
	if len(b) < len(viewsMagic)+sha256.Size || string(b[:len(viewsMagic)]) != viewsMagic {
		return nil, errors.New("not of this version")
	}
	body, trailer := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], trailer) {
		return nil, errors.New("its checksum does not match")
	}
	return decodeBody(string(body[len(viewsMagic):]), path)
}

func decodeBody(s, path string) ([]*view, error) {
	r := &decoder{s: s}
	if got := r.string(); got != path {
		return nil, fmt.Errorf("it is of %q", got)
	}
	n := r.count(sha256.Size + 1)
	views := make([]*view, n)
	for i := range views {
		v := &view{}
		copy(v.key[:], r.bytes(sha256.Size))
		v.tree = r.tree(0)
		views[i] = v
	}
	if r.bad || r.s != "" {
		return nil, errors.New("its form is wrong")
	}
	r.digests(views)
	return views, nil
}

// decoder takes values off the front of s, of which all names stay parts; after the first one that is not there, bad
// is set.
type decoder struct {
	s    string
	bad  bool
	dev  uint64
	sums int
}

func (r *decoder) bytes(n uint64) string {
	if r.bad || n > uint64(len(r.s)) {
		r.bad, r.s = true, ""
		return ""
	}
	out := r.s[:n]
	r.s = r.s[n:]
	return out
}

func (r *decoder) uint() uint64 {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		c := r.bytes(1)
		if c == "" {
			return 0
		}
		v |= uint64(c[0]&0x7f) << shift
		if c[0] < 0x80 {
			return v
		}
	}
	r.bad = true
	return 0
}

func (r *decoder) int() int64 {
	v := r.uint()
	return int64(v>>1) ^ -int64(v&1)
}

func (r *decoder) string() string { return r.bytes(r.uint()) }

// count reads how many things follow that take at least size bytes each.
func (r *decoder) count(size int) int {
	n := r.uint()
	if n > uint64(len(r.s)/size) {
		r.bad = true
		return 0
	}
	return int(n)
}

const (
	smallestNode = 4    // bytes
	maxDepth     = 2048 // more names than that do not fit into a path
)

func (r *decoder) tree(depth int) *tree {
	n := r.count(smallestNode)
	if depth > maxDepth {
		r.bad = true
		return &tree{}
	}
	t := &tree{nodes: make([]node, n)}
	for i := range t.nodes {
		r.node(&t.nodes[i], depth)
		if i > 0 && t.nodes[i-1].name >= t.nodes[i].name {
			r.bad = true
		}
		if r.bad {
			break
		}
	}
	return t
}

func (r *decoder) node(n *node, depth int) {
	head := r.bytes(2)
	if r.bad {
		return
	}
	n.state, n.typ = nodeState(head[0]>>4), index.Type(head[0]&15)
	flags := head[1]
	n.name = r.string()
	if n.name == "" || n.name == "." || n.name == ".." || strings.ContainsAny(n.name, "/\x00") ||
		n.state > taken || n.typ >= index.Whiteout {
		r.bad = true
		return
	}
	if n.state == left {
		return
	}
	if n.typ == 0 || n.state == way && n.typ != index.Dir {
		r.bad = true
		return
	}
	if flags&nodeDevice != 0 {
		r.dev = r.uint()
	}
	n.sure = flags&nodeSure != 0
	n.stat = stat{dev: r.dev, ino: r.uint(), mode: uint32(r.uint()), nlink: uint32(r.uint()), size: int64(r.uint())}
	n.stat.mtime, n.stat.ctime = r.int(), r.int()
	if n.typ == index.Symlink {
		n.target = r.string()
	}
	if flags&nodeDigest != 0 {
		n.digest = digest.Digest(r.bytes(sha256.Size)) // for now: see digests
		r.sums++
	}
	if n.typ == index.File && n.sure && n.digest == "" || typeOf(n.stat.mode) != n.typ || n.stat.size < 0 {
		r.bad = true
	}
	if flags&nodeXattrs != 0 {
		count := r.count(2)
		n.xattrs = map[string]string{}
		for range count {
			k := r.string()
			n.xattrs[k] = r.string()
		}
	}
	if flags&nodeBelow != 0 {
		if n.typ != index.Dir {
			r.bad = true
			return
		}
		n.below = r.tree(depth + 1)
	}
}

// digests turns the raw sums in the nodes into digests, which share one piece of memory.
func (r *decoder) digests(views []*view) {
	const prefix = "sha256:"
	const size = len(prefix) + 2*sha256.Size
	text := make([]byte, 0, r.sums*size)
	var all []*node
	var add func(t *tree)
	add = func(t *tree) {
		for i := range t.list() {
			n := &t.nodes[i]
			if n.digest != "" {
				all = append(all, n)
				text = append(text, prefix...)
				text = hex.AppendEncode(text, []byte(n.digest))
			}
			if n.below != nil {
				add(n.below)
			}
		}
	}
	all = make([]*node, 0, r.sums)
	for _, v := range views {
		add(v.tree)
	}
	s := string(text)
	for i, n := range all {
		n.digest = digest.Digest(s[i*size : (i+1)*size])
	}
}
