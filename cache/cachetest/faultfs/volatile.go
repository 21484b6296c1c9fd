// SPDX-License-Identifier: Apache-2.0

package faultfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/seed-68981b69/slipway/cache/fsys"
)

// Volatile passes calls on and remembers what has not been synced: the bytes of files, whole trees that were renamed in
// from nobody knows where (the upper directory of a step), and new names. PowerCut takes it away.
//
// The model is a journalling file system (ext4, xfs, btrfs): names reach the disk in the order in which they were
// made, some time, or at the sync of their directory; bytes reach it whenever they like, or at the sync of their file.
type Volatile struct {
	FS fsys.FS
	// Journal, when set, gets a line for every change of what is remembered, before the call is carried out if that could be cut
	// short by the death of the process. Replay makes a Volatile of it again.
	Journal io.Writer

	mu    sync.Mutex      // guards what follows
	bytes map[string]bool // files with bytes that were not synced; directories that are like that altogether
	names []string        // names that were not synced, oldest first
}

// event is a line of the journal.
type event struct {
	Op   string
	Path string
	To   string `json:",omitempty"`
}

func (v *Volatile) note(e event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.Journal != nil {
		b, _ := json.Marshal(e)
		if _, err := v.Journal.Write(append(b, '\n')); err != nil {
			panic(fmt.Sprint("journal of volatile files: ", err))
		}
	}
	v.apply(e)
}

func (v *Volatile) apply(e event) {
	if v.bytes == nil {
		v.bytes = map[string]bool{}
	}
	switch e.Op {
	case "write":
		v.bytes[e.Path] = true
	case "name":
		v.names = append(v.names, e.Path)
	case "synced":
		delete(v.bytes, e.Path)
	case "dirsynced":
		v.names = slices.DeleteFunc(v.names, func(n string) bool { return filepath.Dir(n) == e.Path })
	case "syncfs":
		clear(v.bytes)
		v.names = nil
	case "tree":
		v.bytes[e.Path] = true
	case "rename":
		moved := map[string]bool{}
		for p := range v.bytes {
			if rest, ok := within(p, e.Path); ok {
				delete(v.bytes, p)
				moved[e.To+rest] = true
			}
		}
		for p := range moved {
			v.bytes[p] = true
		}
		for i, p := range v.names {
			if rest, ok := within(p, e.Path); ok {
				v.names[i] = e.To + rest
			}
		}
		v.names = append(slices.DeleteFunc(v.names, func(n string) bool { return n == e.To }), e.To)
	case "replace": // a rename over something: what is there afterwards has been there before
		delete(v.bytes, e.To)
		for p := range v.bytes {
			if p == e.Path {
				delete(v.bytes, p)
				v.bytes[e.To] = true
			}
		}
		v.names = slices.DeleteFunc(v.names, func(n string) bool { return n == e.Path })
	case "removed":
		for p := range v.bytes {
			if _, ok := within(p, e.Path); ok {
				delete(v.bytes, p)
			}
		}
		v.names = slices.DeleteFunc(v.names, func(n string) bool { _, ok := within(n, e.Path); return ok })
	}
}

// within returns what is left of path behind dir, if it is dir or below.
func within(path, dir string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, dir)
	return rest, ok && (rest == "" || rest[0] == '/')
}

// Replay makes the Volatile whose journal r is. A line that was cut short ends it.
func Replay(r io.Reader) *Volatile {
	v := &Volatile{FS: fsys.OS, bytes: map[string]bool{}}
	dec := json.NewDecoder(r)
	for {
		var e event
		if dec.Decode(&e) != nil {
			return v
		}
		v.apply(e)
	}
}

// PowerCut does to the files what a power cut might have: bytes that were not synced become fewer, zero or stay; the last few
// names that were not synced are gone. What it did is returned for messages.
func (v *Volatile) PowerCut(rnd *rand.Rand) (did []string, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var paths []string
	for p := range v.bytes {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	for _, p := range paths {
		err := filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			info, err := d.Info()
			if err != nil || info.Size() == 0 {
				return err
			}
			switch rnd.IntN(3) {
			case 0:
				did = append(did, "emptied "+path)
				return os.Truncate(path, 0)
			case 1:
				did = append(did, "cut "+path)
				half := info.Size() / 2
				if err := os.Truncate(path, half); err != nil {
					return err
				}
				return os.Truncate(path, info.Size()) // zeros, as ext4 shows what was allocated but not written
			}
			return nil
		})
		if err != nil {
			return did, err
		}
	}
	for _, n := range v.names[len(v.names)-rnd.IntN(len(v.names)+1):] {
		did = append(did, "unnamed "+n)
		if err := os.RemoveAll(n); err != nil {
			return did, err
		}
	}
	return did, nil
}

func (v *Volatile) OpenFile(path string, flag int, perm fs.FileMode) (fsys.File, error) {
	f, err := v.FS.OpenFile(path, flag, perm)
	if err != nil {
		return nil, err
	}
	v.note(event{Op: "write", Path: path})
	if flag&os.O_EXCL != 0 {
		v.note(event{Op: "name", Path: path})
	}
	return &volatileFile{f, v, path}, nil
}

type volatileFile struct {
	fsys.File
	v    *Volatile
	path string
}

func (f *volatileFile) Sync() error {
	if err := f.File.Sync(); err != nil {
		return err
	}
	f.v.note(event{Op: "synced", Path: f.path})
	return nil
}

func (v *Volatile) Mkdir(path string, perm fs.FileMode) error { return v.FS.Mkdir(path, perm) }

func (v *Volatile) Rename(from, to string) error {
	e := event{Op: "rename", Path: from, To: to}
	if st, err := os.Lstat(to); err == nil && !st.IsDir() {
		e.Op = "replace"
	}
	// A directory that others have filled.
	if filepath.Base(filepath.Dir(filepath.Dir(from))) == "uppers" {
		v.note(event{Op: "tree", Path: from})
	}
	v.note(e)
	err := v.FS.Rename(from, to)
	if err != nil && e.Op == "rename" {
		v.note(event{Op: "rename", Path: to, To: from})
	}
	return err
}

func (v *Volatile) Link(from, to string) error {
	if err := v.FS.Link(from, to); err != nil {
		return err
	}
	v.note(event{Op: "name", Path: to})
	return nil
}

func (v *Volatile) RemoveAll(path string) error {
	v.note(event{Op: "removed", Path: path})
	return v.FS.RemoveAll(path)
}

func (v *Volatile) Sync(dir string) error {
	if err := v.FS.Sync(dir); err != nil {
		return err
	}
	v.note(event{Op: "dirsynced", Path: filepath.Clean(dir)})
	return nil
}

func (v *Volatile) SyncFS(dir *os.File) error {
	if err := v.FS.SyncFS(dir); err != nil {
		return err
	}
	v.note(event{Op: "syncfs"})
	return nil
}

func (v *Volatile) Free(path string) (int64, error) { return v.FS.Free(path) }
