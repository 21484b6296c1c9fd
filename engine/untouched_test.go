// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// watch tells of everything that is opened or made in directories.
type watch struct {
	t    *testing.T
	fd   int
	dirs map[int32]string
}

func newWatch(t *testing.T) *watch {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &watch{t: t, fd: fd, dirs: map[int32]string{}}
}

// add watches dir and the directories in it, down to depth.
func (w *watch) add(dir string, depth int) {
	w.t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if rel != "." && strings.Count(rel, "/")+1 > depth {
			return fs.SkipDir
		}
		n, err := unix.InotifyAddWatch(w.fd, path, unix.IN_OPEN|unix.IN_CREATE|unix.IN_MOVED_TO)
		if err != nil {
			return err
		}
		w.dirs[int32(n)] = path
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.events() // the walk's own
}

// events returns what has happened since the last call.
func (w *watch) events() []string {
	w.t.Helper()
	var out []string
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(w.fd, buf)
		if err == unix.EAGAIN {
			return out
		}
		if err != nil {
			w.t.Fatal(err)
		}
		for b := buf[:n]; len(b) > 0; {
			dir, mask, size := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
			name := string(bytes.TrimRight(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size], "\x00"))
			what := "opened"
			if mask&unix.IN_OPEN == 0 {
				what = "made"
			}
			out = append(out, fmt.Sprintf("%s %s", what, filepath.Join(w.dirs[dir], name)))
			b = b[unix.SizeofInotifyEvent+size:]
		}
	}
}

// quiet returns when nothing has happened for half a second.
func (w *watch) quiet() {
	w.t.Helper()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}, 500)
		switch {
		case err == unix.EINTR:
		case err != nil:
			w.t.Fatal(err)
		case n == 0:
			return
		}
		w.events()
	}
}

// TestCachedBuildTouchesNoLayer: a build that finds everything in the cache opens no file of any layer, neither tar, tree nor
// index, and makes no mount: a mount needs a mount point, and the directories of those are watched too. That goes for an
// engine that has made the layers and for one that has just been started.
func TestCachedBuildTouchesNoLayer(t *testing.T) {
	te := openTest(t)
	te.base()
	r := request{name: "app", files: map[string]string{
		"f": "one",
		"Dockerfile": `FROM base AS a
COPY f /f
RUN cat /f > /g
FROM base AS b
RUN echo b > /b
FROM base
COPY --from=a /g /g
COPY --from=b /b /b
RUN cat /g /b > /all
`,
	}}
	dir := t.TempDir()
	first, err := te.buildFiles(r, dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, engine := range []string{"the same engine", "a new engine"} {
		t.Run(engine, func(t *testing.T) {
			if engine == "a new engine" {
				te.stop()
				te = openAt(t, te.root)
			}
			// What an earlier build has left to do in the background ends, and the engine knows its layers.
			if _, err := te.buildFiles(r, dir); err != nil {
				t.Fatal(err)
			}
			w := newWatch(t)
			w.add(filepath.Join(te.root, "layers"), 2)
			w.add(filepath.Join(te.root, "snapshots"), 2)
			w.quiet()
			again, err := te.buildFiles(r, dir)
			if err != nil {
				t.Fatal(err)
			}
			events := w.events()
			if cached, ran := again.steps(); len(cached) != 7 || len(ran) > 0 {
				t.Errorf("cached %q, ran %q", cached, ran)
			}
			if again.response["containerimage.digest"] != first.response["containerimage.digest"] {
				t.Errorf("the image is another one")
			}
			if len(events) > 0 {
				t.Errorf("a cached build has\n%s", strings.Join(events, "\n"))
			}

			// The watch is not blind.
			changed := r
			changed.files = map[string]string{"f": "one", "Dockerfile": r.files["Dockerfile"] + "RUN cat /all # " + engine}
			if _, err := te.buildFiles(changed, dir); err != nil {
				t.Fatal(err)
			}
			events = strings.Split(strings.Join(w.events(), "\n"), "\n")
			for _, want := range []string{"made " + filepath.Join(te.root, "snapshots", "mnt") + "/", "made " + filepath.Join(te.root, "layers", "uppers") + "/"} {
				if !slices.ContainsFunc(events, func(e string) bool { return strings.HasPrefix(e, want) }) {
					t.Errorf("a step that ran was not seen: no %q in %q", want, events)
				}
			}
		})
	}
}
