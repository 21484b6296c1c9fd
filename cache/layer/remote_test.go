// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// elsewhere is where the tars of remote layers are, by diff ID.
type elsewhere struct {
	mu    sync.Mutex
	tars  map[digest.Digest][]byte
	asked map[digest.Digest]int
	fail  error
}

// away returns a store that fetches from the returned place.
func away(t *testing.T, s *Store) *elsewhere {
	e := &elsewhere{tars: map[digest.Digest][]byte{}, asked: map[digest.Digest]int{}}
	s.OnFetch("test", e.fetch)
	return e
}

func (e *elsewhere) fetch(_ context.Context, info Info, _ string) (io.ReadCloser, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked[info.DiffID]++
	if e.fail != nil {
		return nil, e.fail
	}
	b, ok := e.tars[info.DiffID]
	if !ok {
		return nil, errors.New("no such tar")
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (e *elsewhere) fetches(d digest.Digest) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked[d]
}

// export commits a draft of entries over below in another store, and puts its tar there.
func (e *elsewhere) export(t *testing.T, from *Store, below Files, put ...index.Entry) (ID, Info, *index.Index) {
	t.Helper()
	d := from.NewDraft(below)
	for _, entry := range put {
		content := strings.Repeat("x", int(entry.Size))
		d.Put(entry, text(content))
	}
	id, err := d.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return e.exported(t, from, id)
}

func (e *elsewhere) exported(t *testing.T, from *Store, id ID) (ID, Info, *index.Index) {
	t.Helper()
	r, _, err := from.OpenTar(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	info, err := from.Stat(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	x, err := from.Index(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	e.tars[info.DiffID] = b
	return id, info, x
}

func sized(path string, n int) index.Entry {
	return index.Entry{Path: path, Type: index.File, Mode: 0o644, Size: int64(n), ModTime: 1e18}
}

func addRemote(t *testing.T, s *Store, r Remote) ID {
	t.Helper()
	if r.Origin == "" {
		r.Origin = "test:somewhere"
	}
	id, err := s.AddRemote(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRemote(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		from := openStore(t, Options{})
		e := away(t, s)
		a, aInfo, _ := e.export(t, from, nil, dir("d"), sized("d/f", 100_000))
		_, bInfo, bIndex := e.export(t, from, newStack(t, from, a), sized("d/g", 5), index.Entry{Path: "d/f", Type: index.Whiteout})

		lower := addRemote(t, s, Remote{DiffID: aInfo.DiffID, TarSize: aInfo.TarSize, Origin: "test:one"})
		upper := addRemote(t, s, Remote{DiffID: bInfo.DiffID, Index: bIndex, Below: []ID{lower}, Origin: "test:one"})
		if again := addRemote(t, s, Remote{DiffID: aInfo.DiffID, Origin: "test:two"}); again != lower {
			t.Errorf("the same layer is %s and %s", lower, again)
		}
		info, err := s.Stat(ctx, lower)
		if err != nil || info.Form != FormRemote || info.Content != "" || info.DiffID != aInfo.DiffID || info.Size > 16<<10 {
			t.Errorf("stat: %+v, %v", info, err)
		}
		if !slices.Equal(info.Where.Origins, []string{"test:two", "test:one"}) {
			t.Errorf("origins: %v", info.Where.Origins)
		}
		if info, _ := s.Stat(ctx, upper); info.Content != bInfo.Content || info.Form != FormRemote || !slices.Equal(info.Where.Below, []ID{lower}) {
			t.Errorf("stat: %+v", info)
		}
		if x, err := s.Index(ctx, upper); err != nil || x.Digest() != bInfo.Content {
			t.Errorf("index: %v", err)
		}
		if root, err := s.Root(ctx, upper); err != nil || root.Mode != 0o755 {
			t.Errorf("root: %v, %v", root, err)
		}
		if n := e.fetches(aInfo.DiffID) + e.fetches(bInfo.DiffID); n != 0 {
			t.Errorf("%d fetches for what is known", n)
		}
		// The lower one has no index: to ask for it brings it here. The upper one comes with a file.
		if x, err := s.Index(ctx, lower); err != nil || x.Digest() != aInfo.Content {
			t.Errorf("index: %v", err)
		}
		r, err := s.OpenFile(ctx, upper, "d/g")
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != "xxxxx" {
			t.Errorf("read %q, %v", b, err)
		}
		r.Close()
		for _, id := range []ID{lower, upper} {
			if info, err := s.Stat(ctx, id); err != nil || info.Form != FormTar || info.Where != nil {
				t.Errorf("after it has come: %+v, %v", info, err)
			}
		}
		if addRemote(t, s, Remote{DiffID: aInfo.DiffID}) != lower {
			t.Error("the layer that has come has another ID")
		}
		if e.fetches(aInfo.DiffID) != 1 || e.fetches(bInfo.DiffID) != 1 {
			t.Errorf("fetched %v", e.asked)
		}
		at := mountOverlay(t, s, lower, upper)
		if names, _ := filepath.Glob(at + "/d/*"); len(names) != 1 {
			t.Errorf("mounted: %v", names)
		}
		checkAll(t, s, "")
	})
}

// TestRemoteIsKnown: what Unpack would have made is what AddRemote finds.
func TestRemoteIsKnown(t *testing.T) {
	s, from := openStore(t, Options{NoEROFS: true}), openStore(t, Options{NoEROFS: true})
	e := away(t, s)
	_, info, _ := e.export(t, from, nil, sized("f", 1))
	made, err := s.Unpack(t.Context(), bytes.NewReader(e.tars[info.DiffID]), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if id := addRemote(t, s, Remote{DiffID: info.DiffID}); id != made {
		t.Errorf("%s was there, %s is remote", made, id)
	}
	if _, err := s.AddRemote(t.Context(), Remote{DiffID: info.DiffID, Below: []ID{"d00"}}); !errors.Is(err, ErrNotFound) {
		t.Errorf("over nothing: %v", err)
	}
	if _, err := s.AddRemote(t.Context(), Remote{DiffID: "sha256:xyz"}); err == nil {
		t.Error("a diff ID that is none")
	}
}

// TestRemoteReopen: remote layers survive the process, with their index, and come later.
func TestRemoteReopen(t *testing.T) {
	ctx := context.Background()
	from := openStore(t, Options{NoEROFS: true})
	where := t.TempDir()
	open := func() *Store {
		s, err := Open(where, Options{NoEROFS: true, Log: discard})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	e := away(t, s)
	_, info, x := e.export(t, from, nil, sized("f", 10))
	id := addRemote(t, s, Remote{DiffID: info.DiffID, Index: x})
	s.Close()
	s = open()
	s.OnFetch("test", e.fetch)
	if got, err := s.Stat(ctx, id); err != nil || got.Form != FormRemote || got.Content != info.Content {
		t.Errorf("stat: %+v, %v", got, err)
	}
	if _, err := s.Index(ctx, id); err != nil || len(e.asked) != 0 {
		t.Errorf("index: %v, %v", err, e.asked)
	}
	// A damaged index costs the fetch, no more.
	if err := os.WriteFile(s.path(id, indexFile), []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.indexes.drop(id)
	if found, err := s.Check(ctx, id); err != nil || len(found) != 1 || !found[0].Derived {
		t.Errorf("check: %v, %v", found, err)
	}
	if _, err := s.Index(ctx, id); err != nil || e.fetches(info.DiffID) != 1 {
		t.Errorf("index: %v, %v", err, e.asked)
	}
	s.Close()
	s = open()
	defer s.Close()
	if got, err := s.Pack(ctx, id); err != nil || got.Form != FormTar || got.DiffID != info.DiffID {
		t.Errorf("pack: %+v, %v", got, err)
	}
	checkAll(t, s, "")
}

// TestRemoteReboot takes away what was not synced: a remote layer that no sync has covered is missing in the next boot and can be made known
// again; one that was covered, and one whose bytes have come, are there.
func TestRemoteReboot(t *testing.T) {
	ctx := context.Background()
	from := openStore(t, Options{NoEROFS: true})
	where := t.TempDir()
	var e *elsewhere
	open := func(boot string) *Store {
		s, err := Open(where, Options{NoEROFS: true, BootID: boot, Log: discard})
		if err != nil {
			t.Fatal(err)
		}
		if e == nil {
			e = away(t, s)
		}
		s.OnFetch("test", e.fetch)
		return s
	}
	s := open("first")
	known := map[string]Remote{}
	ids := map[string]ID{}
	add := func(name string) {
		_, info, x := e.export(t, from, nil, sized(name, 10))
		known[name] = Remote{DiffID: info.DiffID, Index: x}
		ids[name] = addRemote(t, s, known[name])
	}
	add("covered")
	if err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"no info", "no index", "whole", "come"} {
		add(name)
	}
	if err := s.Materialise(ctx, ids["come"]); err != nil {
		t.Fatal(err)
	}
	s.Close()
	for name, file := range map[string]string{"no info": infoFile, "no index": indexFile} {
		if err := os.Truncate(s.path(ids[name], file), 0); err != nil {
			t.Fatal(err)
		}
	}
	s = open("second")
	defer s.Close()
	for name, want := range map[string]any{"covered": FormRemote, "come": FormTar} {
		if got, err := s.Stat(ctx, ids[name]); err != nil || got.Form != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, name := range []string{"no info", "no index", "whole"} {
		if _, err := s.Stat(ctx, ids[name]); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v; it may not be on disk", name, err)
		}
		if id := addRemote(t, s, known[name]); id != ids[name] {
			t.Errorf("%s: known again as %s, was %s", name, id, ids[name])
		}
		if x, err := s.Index(ctx, ids[name]); err != nil || x.Digest() != known[name].Index.Digest() {
			t.Errorf("%s: index: %v", name, err)
		}
	}
	checkAll(t, s, "made known again")
	if err := s.Materialise(ctx, ids["no info"], ids["no index"], ids["whole"], ids["covered"]); err != nil {
		t.Error(err)
	}
	checkAll(t, s, "all come")
}

// TestRemoteUnavailable: nothing of a layer that cannot be fetched stays behind, and it can be forgotten.
func TestRemoteUnavailable(t *testing.T) {
	s, from := openStore(t, Options{NoEROFS: true}), openStore(t, Options{NoEROFS: true})
	ctx := t.Context()
	e := away(t, s)
	_, info, _ := e.export(t, from, nil, sized("f", 10))
	id := addRemote(t, s, Remote{DiffID: info.DiffID})
	right := e.tars[info.DiffID]
	for name, set := range map[string]func(){
		"refused":   func() { e.fail = errors.New("refused") },
		"wrong":     func() { e.tars[info.DiffID] = e.tars["other"] },
		"truncated": func() { e.tars[info.DiffID] = right[:700] },
		"longer":    func() { e.tars[info.DiffID] = append(slices.Clone(right), 0) },
	} {
		e.tars["other"] = make([]byte, 1024)
		set()
		if _, err := s.Mount(ctx, id); !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrDigest) && name != "truncated" {
			t.Errorf("%s: %v", name, err)
		} else if err == nil {
			t.Errorf("%s: it came", name)
		}
		if got, err := s.Stat(ctx, id); err != nil || got.Form != FormRemote {
			t.Errorf("%s: afterwards %+v, %v", name, got, err)
		}
		e.fail, e.tars[info.DiffID] = nil, right
	}
	if err := s.Forget(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("forgotten: %v", err)
	}
	again := addRemote(t, s, Remote{DiffID: info.DiffID})
	if err := s.Materialise(ctx, again); err != nil || again != id {
		t.Error(err)
	}
	if err := s.Forget(ctx, id); err != nil || !s.Exists(id) {
		t.Errorf("a layer that is here was forgotten: %v", err)
	}
}

// TestRemoteFalseIndex: bytes that are not what the index said cost the layer.
func TestRemoteFalseIndex(t *testing.T) {
	s, from := openStore(t, Options{NoEROFS: true}), openStore(t, Options{NoEROFS: true})
	ctx := t.Context()
	e := away(t, s)
	_, info, _ := e.export(t, from, nil, sized("f", 10), sized("g", 10))
	for name, change := range map[string]func(*index.Entry){
		"mode":   func(e *index.Entry) { e.Mode = 0o755 },
		"time":   func(e *index.Entry) { e.ModTime += 1e9 },
		"digest": func(e *index.Entry) { e.Digest = digest.FromString("else") },
		"path":   func(e *index.Entry) { e.Path = "h" },
	} {
		entry := sized("g", 10)
		entry.Digest = digest.FromString("xxxxxxxxxx")
		f := sized("f", 10)
		f.Digest = entry.Digest
		change(&entry)
		id := addRemote(t, s, Remote{DiffID: info.DiffID, Index: index.New([]index.Entry{{Type: index.Dir, Mode: 0o755}, f, entry})})
		if err := s.Materialise(ctx, id); !errors.Is(err, ErrFalseIndex) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Stat(ctx, id); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: it is still there: %v", name, err)
		}
	}
}

// TestRemoteOnce: any number of users of a stack cause one fetch of each layer; the layers come at the same time; one that
// has waited in vain tries for itself; one who gives up does not stop the others.
func TestRemoteOnce(t *testing.T) {
	s, from := openStore(t, Options{NoEROFS: true}), openStore(t, Options{NoEROFS: true})
	e := away(t, s)
	var ids, made []ID
	for i := range 3 {
		var below Files
		if i > 0 {
			below = newStack(t, from, made...)
		}
		id, info, _ := e.export(t, from, below, sized(fmt.Sprint("f", i), 10))
		made = append(made, id)
		ids = append(ids, addRemote(t, s, Remote{DiffID: info.DiffID, Below: slices.Clone(ids)}))
	}
	began := make(chan struct{}, 100)
	goOn := make(chan struct{})
	var refuse atomic.Bool
	type user struct{}
	s.OnFetch("test", func(ctx context.Context, info Info, origin string) (io.ReadCloser, error) {
		began <- struct{}{}
		select {
		case <-goOn:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if refuse.Load() && ctx.Value(user{}) == "stranger" {
			return nil, errors.New("not for strangers")
		}
		return e.fetch(ctx, info, origin)
	})
	refuse.Store(true)
	var wg sync.WaitGroup
	strange := make(chan error, 1)
	wg.Go(func() { strange <- s.Materialise(context.WithValue(t.Context(), user{}, "stranger"), ids...) })
	for range ids {
		<-began // all of them at once, before any has come
	}
	gone, cancel := context.WithCancelCause(t.Context())
	left := errors.New("left")
	joined := make(chan error, 5)
	for range 5 {
		wg.Go(func() { joined <- s.Materialise(t.Context(), ids...) })
	}
	cancel(left)
	if _, err := s.Index(gone, ids[2]); !errors.Is(err, left) {
		t.Errorf("who gives up: %v", err)
	}
	close(goOn)
	wg.Wait()
	if err := <-strange; !errors.Is(err, ErrUnavailable) {
		t.Errorf("the stranger: %v", err)
	}
	for range 5 {
		if err := <-joined; err != nil {
			t.Error(err)
		}
	}
	for _, id := range ids {
		if info, _ := s.Stat(t.Context(), id); info.Form != FormTar || e.fetches(info.DiffID) != 1 {
			t.Errorf("%+v was fetched %d times", info, e.fetches(info.DiffID))
		}
	}
}

// TestRemoteCancel: when nobody waits any more the fetch ends, and Delete ends it too.
func TestRemoteCancel(t *testing.T) {
	s, from := openStore(t, Options{NoEROFS: true}), openStore(t, Options{NoEROFS: true})
	e := away(t, s)
	_, info, _ := e.export(t, from, nil, sized("f", 10))
	id := addRemote(t, s, Remote{DiffID: info.DiffID})
	began := make(chan struct{})
	s.OnFetch("test", func(ctx context.Context, _ Info, _ string) (io.ReadCloser, error) {
		began <- struct{}{}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		<-began
		cancel(errors.New("enough"))
		<-began
		if err := s.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	})
	if err := s.Materialise(ctx, id); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("canceled: %v", err)
	}
	if err := s.Materialise(t.Context(), id); !errors.Is(err, errDeleted) {
		t.Errorf("deleted: %v", err)
	}
}

// TestRemoteScattered: a remote layer with a hard link to a file of the layer below, whose bytes are needed then.
func TestRemoteScattered(t *testing.T) {
	bothForms(t, func(t *testing.T, s *Store) {
		from := openStore(t, Options{})
		e := away(t, s)
		a, aInfo, aIndex := e.export(t, from, nil, sized("f", 1000))
		raw := linkTar(t)
		id, err := from.Unpack(t.Context(), bytes.NewReader(raw), "", newStack(t, from, a))
		if err != nil {
			t.Fatal(err)
		}
		_, bInfo, bIndex := e.exported(t, from, id)
		for _, known := range []bool{true, false} {
			var ax, bx *index.Index
			if known {
				ax, bx = aIndex, bIndex
			}
			lower := addRemote(t, s, Remote{DiffID: aInfo.DiffID, Index: ax})
			upper := addRemote(t, s, Remote{DiffID: bInfo.DiffID, Index: bx, Below: []ID{lower}})
			r, err := s.OpenFile(t.Context(), upper, "link")
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(r); err != nil || len(b) != 1000 {
				t.Errorf("%d bytes, %v", len(b), err)
			}
			r.Close()
			checkAll(t, s, "")
			for _, id := range []ID{upper, lower} {
				if err := s.Delete(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// linkTar has a hard link to a file of the layer below.
func linkTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "link", Typeflag: tar.TypeLink, Linkname: "f"}), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestRemoteOrigins: an origin that fails, breaks off or gives something else is passed over for the next one.
func TestRemoteOrigins(t *testing.T) {
	s, from := openStore(t, Options{NoEROFS: true}), openStore(t, Options{NoEROFS: true})
	e := away(t, s)
	_, info, _ := e.export(t, from, nil, sized("f", 10))
	right := e.tars[info.DiffID]
	var asked []string
	s.OnFetch("test", func(_ context.Context, _ Info, origin string) (io.ReadCloser, error) {
		asked = append(asked, origin)
		switch origin {
		case "test:refuses":
			return nil, errors.New("no")
		case "test:breaks":
			return io.NopCloser(io.MultiReader(bytes.NewReader(right[:600]), iotest.ErrReader(io.ErrUnexpectedEOF))), nil
		case "test:lies":
			return io.NopCloser(bytes.NewReader(make([]byte, 1024))), nil
		}
		return io.NopCloser(bytes.NewReader(right)), nil
	})
	id := ID("")
	for _, origin := range []string{"test:right", "test:lies", "test:breaks", "test:refuses", "unknown:x"} {
		id = addRemote(t, s, Remote{DiffID: info.DiffID, Origin: origin})
	}
	if err := s.Materialise(t.Context(), id); err != nil {
		t.Error(err)
	}
	if want := []string{"test:refuses", "test:breaks", "test:lies", "test:lies", "test:right"}; !slices.Equal(asked, want) {
		t.Errorf("asked %v, want %v", asked, want)
	}
}
