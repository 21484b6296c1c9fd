// SPDX-License-Identifier: Apache-2.0

package chunk

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a place in memory, which counts. The backends' own tests are those of share and share/s3.
type memory struct {
	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	put      int64
	requests int
	read     int64
}

func newMemory() *memory { return &memory{blobs: map[digest.Digest][]byte{}} }

func (p *memory) Missing(_ context.Context, descs []ocispec.Descriptor) (out []ocispec.Descriptor, _ error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range descs {
		if _, ok := p.blobs[d.Digest]; !ok {
			out = append(out, d)
		}
	}
	return out, nil
}

func (p *memory) Open(_ context.Context, d ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, ok := p.blobs[d.Digest]
	if !ok {
		return nil, errors.New("not found")
	}
	b = b[offset:]
	if length >= 0 {
		b = b[:min(length, int64(len(b)))]
	}
	p.requests++
	p.read += int64(len(b))
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (p *memory) Put(_ context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	r, err := open()
	if err != nil {
		return err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if digest.FromBytes(b) != d.Digest || int64(len(b)) != d.Size {
		return fmt.Errorf("blob %s has other bytes", d.Digest)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blobs[d.Digest] = b
	p.put += d.Size
	return nil
}

// random returns bytes that compress somewhat.
func random(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.UintN(64))
	}
	return b
}

func cuts(t interface{ Fatal(...any) }, b []byte) [][]byte {
	var out [][]byte
	c := newCutter(func(b []byte) error {
		out = append(out, bytes.Clone(b))
		freeChunk(b)
		return nil
	})
	if _, err := c.take(iotest{bytes.NewReader(b)}, -1); err != nil {
		t.Fatal(err)
	}
	if err := c.flush(); err != nil {
		t.Fatal(err)
	}
	return out
}

// iotest gives bytes in odd portions.
type iotest struct{ r io.Reader }

func (r iotest) Read(p []byte) (int, error) { return r.r.Read(p[:min(len(p), 7777)]) }

func TestCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := random(rapid.Uint64().Draw(t, "seed"), rapid.IntRange(0, 1<<20).Draw(t, "length"))
		chunks := cuts(t, b)
		if !bytes.Equal(bytes.Join(chunks, nil), b) {
			t.Fatal("the chunks are not the input")
		}
		for i, c := range chunks {
			if len(c) > maxCut || i < len(chunks)-1 && len(c) < minChunk {
				t.Fatalf("chunk %d of %d has %d bytes", i, len(chunks), len(c))
			}
			// Where a chunk ends depends on nothing before it, and on nothing behind it.
			if n := cut(bytes.Clone(bytes.Join(chunks[i:], nil))); n != len(c) {
				t.Fatalf("chunk %d has %d bytes and alone %d", i, len(c), n)
			}
		}
	})
}

func TestCutFindsItsPlaceAgain(t *testing.T) {
	b := random(1, 16<<20)
	before := map[string]bool{}
	for _, c := range cuts(t, b) {
		before[string(c)] = true
	}
	if n := len(before); n < 16<<20/maxCut || n > 16<<20/avgChunk*2 {
		t.Errorf("%d chunks of 16 MiB", n)
	}
	for _, at := range []int{0, 1 << 20, 15 << 20} {
		changed := bytes.Join([][]byte{b[:at], []byte("inserted"), b[at:]}, nil)
		fresh := 0
		for _, c := range cuts(t, changed) {
			if !before[string(c)] {
				fresh++
			}
		}
		if fresh == 0 || fresh > 4 {
			t.Errorf("%d chunks are new after 8 bytes were inserted at %d", fresh, at)
		}
	}
}

// makeTree makes files of all kinds that travel.
func makeTree(t *testing.T, dir string, files int) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	when := time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)
	for i := range files {
		sub := filepath.Join(dir, fmt.Sprintf("%02x", i%37), "x.y")
		must(os.MkdirAll(sub, 0o755))
		size := i % 3000
		if i%50 == 0 {
			size = 20_000 + i*11
		}
		p := filepath.Join(sub, fmt.Sprintf("f%05d", i))
		must(os.WriteFile(p, random(uint64(i), size), os.FileMode(0o600+i%0o170)))
		must(os.Chtimes(p, when.Add(time.Duration(i)*time.Second), when.Add(time.Duration(i)*time.Millisecond)))
	}
	must(os.WriteFile(filepath.Join(dir, "large"), random(99, 21<<20), 0o4755))
	must(os.WriteFile(filepath.Join(dir, "empty"), nil, 0o644))
	must(os.WriteFile(filepath.Join(dir, "zz empty"), nil, 0o644))
	must(os.Symlink("/etc/passwd", filepath.Join(dir, "absolute")))
	must(os.Symlink("../../..", filepath.Join(dir, "up")))
	must(os.Link(filepath.Join(dir, "large"), filepath.Join(dir, "same")))
	must(os.Link(filepath.Join(dir, "up"), filepath.Join(dir, "up again")))
	must(os.Mkdir(filepath.Join(dir, "nothing in it"), 0o1777))
	must(os.Chmod(filepath.Join(dir, "nothing in it"), 0o1777|os.ModeSticky))
	must(unix.Setxattr(filepath.Join(dir, "empty"), "user.note", []byte("a\x00b"), 0))
	if os.Geteuid() == 0 {
		must(os.Lchown(filepath.Join(dir, "absolute"), 12, 34))
		must(os.Chown(filepath.Join(dir, "empty"), 1234, 70000))
	}
	must(os.Chtimes(filepath.Join(dir, "nothing in it"), when, when))
	must(os.Chmod(dir, 0o750))
	must(os.Chtimes(dir, when, when))
}

// listing describes a tree: all that must be the same after a restore.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	inodes := map[uint64]string{}
	err := filepath.Walk(dir, func(p string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		fmt.Fprintf(&out, "%q %o %d:%d %d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Nano())
		switch {
		case info.Mode().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, " %d %s", len(b), digest.FromBytes(b).Encoded()[:12])
			v := make([]byte, 10)
			if n, err := unix.Getxattr(p, "user.note", v); err == nil {
				fmt.Fprintf(&out, " note=%q", v[:n])
			}
		case info.Mode()&os.ModeSymlink != 0:
			target, _ := os.Readlink(p)
			fmt.Fprintf(&out, " -> %s", target)
		}
		if !info.IsDir() && st.Nlink > 1 {
			if first, ok := inodes[st.Ino]; ok {
				fmt.Fprintf(&out, " is %q", first)
			} else {
				inodes[st.Ino] = rel
			}
		}
		out.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestTree(t *testing.T) {
	ctx := t.Context()
	dir, place := t.TempDir(), newMemory()
	makeTree(t, dir, 1500)
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	ref, first, err := NewWriter(place).AddTree(ctx, dir, TreeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if first.Left != 1 || first.Changed != 0 || first.Files != 1503 || len(ref.Packs) < 2 {
		t.Errorf("exported %+v, %d packs", first, len(ref.Packs))
	}
	if err := os.Remove(filepath.Join(dir, "pipe")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(dir, time.Time{}, time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)); err != nil {
		t.Fatal(err)
	}
	want := listing(t, dir)
	restoreAndCompare := func(ref Ref) {
		t.Helper()
		to := t.TempDir()
		place.requests = 0
		if _, err := Restore(ctx, place, ref, to); err != nil {
			t.Fatal(err)
		}
		got := listing(t, to)
		// The directory that the pipe was in had another time when it was exported.
		_, want, _ := strings.Cut(want, "\n")
		_, got, _ = strings.Cut(got, "\n")
		if got != want {
			t.Errorf("restored\n%s\nwant\n%s", firstDifference(got, want), firstDifference(want, got))
		}
		if place.requests > 40 {
			t.Errorf("%d requests for %d packs", place.requests, len(ref.Packs))
		}
	}
	restoreAndCompare(ref)

	// The same again by somebody who knows nothing has the same bytes.
	if again, _, err := NewWriter(place).AddTree(ctx, dir, TreeOptions{}); err != nil {
		t.Fatal(err)
	} else if len(again.Packs) != len(ref.Packs) || again.Packs[0].Digest != ref.Packs[0].Digest {
		t.Errorf("exported again: %v, before %v", again, ref)
	}

	// One line changed, one file more and one gone.
	p := filepath.Join(dir, "05/x.y/f00005")
	if err := os.WriteFile(p, []byte("one line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "07/x.y/f00007")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "07/new"), random(5, 30_000), 0o600); err != nil {
		t.Fatal(err)
	}
	want = listing(t, dir)
	w := NewWriter(place)
	if err := w.Know(ctx, ref); err != nil {
		t.Fatal(err)
	}
	second, stats, err := w.AddTree(ctx, dir, TreeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Sent*20 > first.Sent {
		t.Errorf("the second export has sent %d bytes, the first %d", stats.Sent, first.Sent)
	}
	t.Logf("first %+v, second %+v", first, stats)
	restoreAndCompare(second)
}

func firstDifference(a, b string) string {
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range as {
		if i >= len(bs) || as[i] != bs[i] {
			return as[i]
		}
	}
	return "(the same up to its end)"
}

// TestTreeCap leaves out what was used least recently.
func TestTreeCap(t *testing.T) {
	ctx := t.Context()
	dir, place := t.TempDir(), newMemory()
	now := time.Now()
	for i, age := range []time.Duration{1, 50, 100, 200} {
		p := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(p, random(uint64(i), 100_000), 0o600); err != nil {
			t.Fatal(err)
		}
		atime, mtime := now.Add(-age*time.Hour), now.Add(-age*time.Hour)
		if i == 3 {
			atime = now.Add(-10 * time.Hour) // old, but read
		}
		if err := os.Chtimes(p, atime, mtime); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "2"), filepath.Join(dir, "two")); err != nil {
		t.Fatal(err)
	}
	ref, stats, err := NewWriter(place).AddTree(ctx, dir, TreeOptions{MaxSize: 250_000})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Dropped != 2 || stats.Changed != 0 {
		t.Errorf("%+v", stats)
	}
	to := t.TempDir()
	if _, err := Restore(ctx, place, ref, to); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(to)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "0 3" {
		t.Errorf("restored %s, want 0 3", got)
	}
	// A file that was read after it was written has the time of that as its access time, so that a next export knows.
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(to, "3"), &st); err != nil {
		t.Fatal(err)
	}
	if age := now.Sub(time.Unix(st.Atim.Unix())); age > 12*time.Hour {
		t.Errorf("its access time is %v ago", age)
	}
}

// TestTreeChanges leaves out what is changed after the moment that Since tells.
func TestTreeChanges(t *testing.T) {
	ctx := t.Context()
	dir, place := t.TempDir(), newMemory()
	for _, name := range []string{"a", "b", "c"} {
		if err := os.WriteFile(filepath.Join(dir, name), random(1, 50_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "c"), &st); err != nil {
		t.Fatal(err)
	}
	since := time.Unix(st.Ctim.Unix()).Add(time.Second)
	// b changes later than that moment, as far as the clocks say.
	for {
		if err := os.Chmod(filepath.Join(dir, "b"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Stat(filepath.Join(dir, "b"), &st); err != nil {
			t.Fatal(err)
		}
		if time.Unix(st.Ctim.Unix()).After(since) {
			break
		}
	}
	ref, stats, err := NewWriter(place).AddTree(ctx, dir, TreeOptions{Since: func() (time.Time, bool) { return since, true }})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Changed != 1 || stats.Files != 2 {
		t.Errorf("%+v", stats)
	}
	to := t.TempDir()
	if _, err := Restore(ctx, place, ref, to); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"a": true, "b": false, "c": true} {
		if _, err := os.Stat(filepath.Join(to, name)); (err == nil) != want {
			t.Errorf("%s is there: %v", name, err == nil)
		}
	}
}

// TestFileChangesWhileRead reads a file that is not the one any more that was scanned.
func TestFileChangesWhileRead(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"shrinks", "grows", "goes", "link", "stays"} {
		if err := os.WriteFile(filepath.Join(dir, name), random(1, 3000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	s, err := scan(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.Truncate(filepath.Join(dir, "shrinks"), 100),
		os.WriteFile(filepath.Join(dir, "grows"), random(1, 4000), 0o600),
		os.Remove(filepath.Join(dir, "goes")),
		os.Remove(filepath.Join(dir, "link")), os.Symlink("/etc/passwd", filepath.Join(dir, "link")),
	); err != nil {
		t.Fatal(err)
	}
	m := &manifest{Kind: kindTree, Small: smallFile}
	place := newMemory()
	w := NewWriter(place)
	if _, err := w.store(t.Context(), m, func(c *cutter) error { return readFiles(t.Context(), root, s.entries, c, m) }); err != nil {
		t.Fatal(err)
	}
	var stats Stats
	m.Entries = finishEntries(s.entries, m, &stats)
	if stats.Changed != 4 || len(m.Entries) != 2 || m.Entries[1].Path != "stays" {
		t.Fatalf("%+v, %v", stats, m.Entries)
	}
	ref, err := w.finish(t.Context(), m, &stats)
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	if _, err := Restore(t.Context(), place, ref, to); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(to, "stays")); err != nil || !bytes.Equal(b, random(1, 3000)) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// makeTar makes a tar of n files and says where their bytes are.
func makeTar(t testing.TB, n int, mtime time.Time, change func(i int) (name string, content []byte)) ([]byte, []Range) {
	t.Helper()
	var buf bytes.Buffer
	var files []Range
	tw := tar.NewWriter(&buf)
	for i := range n {
		name, content := change(i)
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: mtime}); err != nil {
			t.Fatal(err)
		}
		files = append(files, Range{int64(buf.Len()), int64(len(content))})
		if _, err := tw.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), files
}

func TestTar(t *testing.T) {
	ctx := t.Context()
	place := newMemory()
	file := func(i int) (string, []byte) {
		size := i * 7 % 5000
		if i%40 == 0 {
			size = 300_000
		}
		return fmt.Sprintf("dir%d/file%d", i%10, i), random(uint64(i), size)
	}
	b, files := makeTar(t, 3000, time.Unix(1_700_000_000, 0), file)
	ref, first, err := NewWriter(place).AddTar(ctx, bytes.NewReader(b), int64(len(b)), files)
	if err != nil {
		t.Fatal(err)
	}
	read := func(ref Ref, want []byte) {
		t.Helper()
		r, err := OpenTar(ctx, place, ref, int64(len(want)))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes instead of %d, %v", len(got), len(want), err)
		}
	}
	read(ref, b)
	// The files have moved to another directory, with other times, and one has changed.
	changed, files2 := makeTar(t, 3000, time.Unix(1_800_000_000, 0), func(i int) (string, []byte) {
		name, content := file(i)
		if i == 77 {
			content = append([]byte("a line\n"), content...)
		}
		return "elsewhere/" + name, content
	})
	w := NewWriter(place)
	if err := w.Know(ctx, ref); err != nil {
		t.Fatal(err)
	}
	second, stats, err := w.AddTar(ctx, bytes.NewReader(changed), int64(len(changed)), files2)
	if err != nil {
		t.Fatal(err)
	}
	read(second, changed)
	t.Logf("first %+v, second %+v", first, stats)
	if stats.Sent*20 > first.Sent {
		t.Errorf("the second export has sent %d bytes, the first %d", stats.Sent, first.Sent)
	}
	// Without any file, and a closing before the end.
	plain, _, err := NewWriter(place).AddTar(ctx, bytes.NewReader(b), int64(len(b)), nil)
	if err != nil {
		t.Fatal(err)
	}
	read(plain, b)
	r, err := OpenTar(ctx, place, plain, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	canceled, cancel := context.WithCancel(ctx)
	r, err = OpenTar(canceled, place, plain, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("read to %v, want that it was canceled", err)
	}
	r.Close()
	if _, _, err := NewWriter(place).AddTar(ctx, bytes.NewReader(b), int64(len(b)), []Range{{0, 100}, {50, 100}}); err == nil {
		t.Error("files that overlap were taken")
	}
	if _, err := OpenTar(ctx, place, ref, 5); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a tar of another size: %v", err)
	}
}

// TestRepack gives up packs of which little is used, and small ones when they are many.
func TestRepack(t *testing.T) {
	ctx := t.Context()
	place := newMemory()
	content := map[int]int{}
	tarOf := func() ([]byte, []Range) {
		return makeTar(t, 60, time.Unix(1, 0), func(i int) (string, []byte) {
			return fmt.Sprint(i), random(uint64(i*1000+content[i]), 60_000)
		})
	}
	b, files := tarOf()
	ref, _, err := NewWriter(place).AddTar(ctx, bytes.NewReader(b), int64(len(b)), files)
	if err != nil {
		t.Fatal(err)
	}
	most := 0
	for round := range 24 {
		content[round]++
		b, files = tarOf()
		w := NewWriter(place)
		if err := w.Know(ctx, ref); err != nil {
			t.Fatal(err)
		}
		if ref, _, err = w.AddTar(ctx, bytes.NewReader(b), int64(len(b)), files); err != nil {
			t.Fatal(err)
		}
		most = max(most, len(ref.Packs))
		m, err := load(ctx, place, ref)
		if err != nil {
			t.Fatal(err)
		}
		used := make([]int64, len(m.Packs))
		for _, c := range m.Chunks {
			used[c.Pack] += int64(c.Packed)
		}
		for i, p := range m.Packs {
			if round > 0 && used[i]*(leastUse+1) < p.Size {
				t.Errorf("round %d: %d bytes of a pack of %d are used", round, used[i], p.Size)
			}
		}
	}
	if most > smallPacks+4 {
		t.Errorf("up to %d packs for 4 MB", most)
	}
	t.Logf("up to %d packs, %d bytes sent", most, place.put)
}

// TestDamage flips a bit in every blob, at several places: what is restored is right, or there is an error.
func TestDamage(t *testing.T) {
	ctx := t.Context()
	dir, place := t.TempDir(), newMemory()
	for i := range 40 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), random(uint64(i), 20_000+i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ref, _, err := NewWriter(place).AddTree(ctx, dir, TreeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for d, b := range place.blobs {
		for at := 0; at < len(b); at += 1 + len(b)/20 {
			b[at] ^= 0x10
			to := t.TempDir()
			if _, err := Restore(ctx, place, ref, to); !errors.Is(err, ErrCorrupt) {
				t.Errorf("blob %s with byte %d of %d flipped: %v", d, at, len(b), err)
			}
			b[at] ^= 0x10
		}
	}
	for d, b := range place.blobs {
		place.blobs[d] = b[:len(b)/2]
		if _, err := Restore(ctx, place, ref, t.TempDir()); err == nil {
			t.Errorf("half of blob %s is enough", d)
		}
		delete(place.blobs, d)
		if _, err := Restore(ctx, place, ref, t.TempDir()); err == nil {
			t.Errorf("blob %s is not needed", d)
		}
		// Whoever exports again sends it again.
		w := NewWriter(place)
		if err := w.Know(ctx, ref); err != nil {
			t.Fatal(err)
		}
		if ref, _, err = w.AddTree(ctx, dir, TreeOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(ctx, place, ref, t.TempDir()); err != nil {
			t.Error(err)
		}
	}
}
