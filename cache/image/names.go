// SPDX-License-Identifier: Apache-2.0

package image

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// table is every image by its key: its name, or "@" and the digest of its target for one without. What the
// operations on images do to it is decided here, on values, and carried out by Store.
type table map[string]Image

func key(m Image) string {
	if m.Name != "" {
		return m.Name
	}
	return "@" + m.Target.Digest.String()
}

// put returns t with m in it. Whatever had m's name goes on without one, unless it is the same image or has another.
func (t table) put(m Image) table {
	next := maps.Clone(t)
	if m.Name == "" {
		for _, o := range t {
			if o.ID == m.ID && o.Target.Digest == m.Target.Digest {
				return next // named already
			}
		}
		next[key(m)] = m
		return next
	}
	if old, had := t[m.Name]; had && old.ID != m.ID {
		next = t.untag(m.Name)
	}
	next[m.Name] = m
	maps.DeleteFunc(next, func(_ string, o Image) bool { return o.Name == "" && o.ID == m.ID })
	return next
}

// untag returns t without a name that is in it; its image stays.
func (t table) untag(name string) table {
	next := maps.Clone(t)
	m := t[name]
	delete(next, name)
	if len(next.withID(m.ID)) == 0 {
		m.Name = ""
		next[key(m)] = m
	}
	return next
}

// withID returns the images with that ID, by key.
func (t table) withID(id digest.Digest) []Image {
	var ms []Image
	for _, k := range slices.Sorted(maps.Keys(t)) {
		if t[k].ID == id {
			ms = append(ms, t[k])
		}
	}
	return ms
}

// find returns the image that ref means: a name, NAME@DIGEST, or an ID or a prefix of one. byName says that ref
// is a name.
func (t table) find(ref string) (m Image, byName bool, err error) {
	hex, explicit := strings.CutPrefix(ref, "sha256:")
	if explicit || len(hex) == 64 && isHex(hex) {
		m, err = t.findID(ref, hex)
		return m, false, err
	}
	name, nameErr := Normalize(ref)
	if nameErr == nil {
		if m, ok := t[name]; ok {
			return m, true, nil
		}
		if d := nameDigest(name); d != "" {
			for _, k := range slices.Sorted(maps.Keys(t)) {
				if t[k].Name != "" && repository(t[k].Name) == repository(name) && t[k].hasTarget(d) {
					return t[k], true, nil
				}
			}
		}
	}
	if isHex(ref) {
		m, err = t.findID(ref, ref)
		return m, false, err
	}
	if nameErr != nil {
		return Image{}, false, nameErr
	}
	return Image{}, false, notFound(Familiar(name))
}

func (m Image) hasTarget(d digest.Digest) bool {
	return m.Target.Digest == d || slices.ContainsFunc(m.Manifests, func(c Manifest) bool { return c.Target.Digest == d })
}

// findID returns the image whose ID begins with hex; else the one with a manifest whose digest does.
func (t table) findID(ref, hex string) (Image, error) {
	if hex == "" {
		return Image{}, fmt.Errorf("%w %q", ErrInvalidName, ref)
	}
	byID, byTarget := map[digest.Digest]Image{}, map[digest.Digest]Image{}
	for _, k := range slices.Backward(slices.Sorted(maps.Keys(t))) { // a name sorts behind "@…" and the first name wins
		m := t[k]
		if strings.HasPrefix(m.ID.Encoded(), hex) {
			if o, ok := byID[m.ID]; !ok || m.Name != "" || o.Name == "" {
				byID[m.ID] = m
			}
		}
		for _, d := range append(m.digests(), m.Target.Digest) {
			if m.hasTarget(d) && strings.HasPrefix(d.Encoded(), hex) {
				if o, ok := byTarget[m.ID]; !ok || m.Name != "" || o.Name == "" {
					byTarget[m.ID] = m
				}
			}
		}
	}
	for _, found := range []map[digest.Digest]Image{byID, byTarget} {
		switch len(found) {
		case 0:
			continue
		case 1:
			for _, m := range found {
				return m, nil
			}
		}
		ids := slices.Sorted(maps.Keys(found))
		return Image{}, fmt.Errorf("%w %q: give more digits (%d images begin so: %s …)", ErrAmbiguous, ref, len(ids), ids[0])
	}
	return Image{}, notFound(ref)
}

func notFound(ref string) error {
	return fmt.Errorf("%w: %s: it is not in the local store (\"slipway images\" lists what is; \"slipway pull\" fetches from a registry)", ErrNotFound, ref)
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

// Removed is what a removal did.
type Removed struct {
	// Untagged are the names that are gone, normalised.
	Untagged []string
	// Deleted is the ID of the image when it is gone, too; else "".
	Deleted digest.Digest
}

// remove returns t without what ref means: a name, and the image when that was its last; or an image by ID with
// all of its names, of which it may have several only when force is set.
func (t table) remove(ref string, force bool) (table, Removed, error) {
	m, byName, err := t.find(ref)
	if err != nil {
		return nil, Removed{}, err
	}
	all := t.withID(m.ID)
	gone := all
	if byName {
		rest := slices.DeleteFunc(slices.Clone(all), func(o Image) bool { return o.Name == m.Name })
		if !onlyDigests(rest, m.Name) {
			gone = []Image{m}
		}
	} else if !force && !single(all) {
		var names []string
		for _, o := range all {
			names = append(names, Familiar(o.Name))
		}
		return nil, Removed{}, fmt.Errorf("%w: %s: remove it by name, or use force to remove all of: %s", ErrConflict, ref, strings.Join(names, ", "))
	}
	next := maps.Clone(t)
	var r Removed
	for _, o := range gone {
		delete(next, key(o))
		if o.Name != "" {
			r.Untagged = append(r.Untagged, o.Name)
		}
	}
	if len(next.withID(m.ID)) == 0 {
		r.Deleted = m.ID
	}
	return next, r, nil
}

// onlyDigests says that ms have no name but digests of name's repository, which go with its last tag.
func onlyDigests(ms []Image, name string) bool {
	return !slices.ContainsFunc(ms, func(o Image) bool {
		return o.Name != "" && (nameDigest(o.Name) == "" || repository(o.Name) != repository(name))
	})
}

// single says that ms are one name at most, beside digests of its repository.
func single(ms []Image) bool {
	tags := slices.DeleteFunc(slices.Clone(ms), func(o Image) bool { return o.Name == "" || nameDigest(o.Name) != "" })
	if len(tags) == 1 {
		return onlyDigests(slices.DeleteFunc(slices.Clone(ms), func(o Image) bool { return o.Name == tags[0].Name }), tags[0].Name)
	}
	named := slices.DeleteFunc(slices.Clone(ms), func(o Image) bool { return o.Name == "" })
	return len(named) <= 1
}

// digests returns every digest that the images keep.
func (t table) digests() map[digest.Digest]bool {
	ds := map[digest.Digest]bool{}
	for _, m := range t {
		for _, d := range m.digests() {
			ds[d] = true
		}
	}
	return ds
}

// sorted returns the images by name, dangling ones behind, the newest of these first.
func (t table) sorted() []Image {
	ms := slices.Collect(maps.Values(t))
	slices.SortFunc(ms, func(a, b Image) int {
		if (a.Name == "") != (b.Name == "") {
			return -strings.Compare(a.Name, b.Name)
		}
		return cmp.Or(strings.Compare(a.Name, b.Name), b.Created.Compare(a.Created), strings.Compare(string(a.Target.Digest), string(b.Target.Digest)))
	})
	return ms
}
