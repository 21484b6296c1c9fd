// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestStateOnOverlay builds in a state directory that is itself on an overlay, as in a container without a volume: there is no
// EROFS and no overlay there, layers are directories and snapshots copies, and the engine says so.
func TestStateOnOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root: mounts and containers")
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(at(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", at("merged"), "overlay", 0, "lowerdir="+at("lower")+",upperdir="+at("upper")+",workdir="+at("work")); err != nil {
		t.Skip("SKIPPED: no overlay here: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at("merged"), 0); err != nil {
			t.Error(err)
		}
	})
	te := openAt(t, filepath.Join(at("merged"), "state"))
	te.base()
	workers, err := te.client.ListWorkers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]string{LabelLayers: "directories (", LabelSnapshots: "copy (overlay mounts are not available"} {
		if got := workers[0].Labels[label]; !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q…", label, got, want)
		}
	}
	build := func(last string) result {
		return te.mustBuild(request{name: "app", files: map[string]string{"Dockerfile": `FROM base AS one
RUN mkdir /a && echo one >/a/f && ln /a/f /a/g && echo x >/gone && mkdir /old && echo y >/old/z
FROM one
RUN rm /gone && rm -r /old && mkdir /old && chmod 711 /a && touch /etc-new
RUN --mount=type=bind,from=one,target=/in test -f /in/gone && ! touch /in/no && cat /in/a/g
RUN echo 'state:' $(cat /a/f) $(stat -c %h /a/f) $(stat -c %a /a) $(ls /old | wc -l) $(ls / | tr '\n' ' ')
` + last}})
	}
	out := build("RUN echo last\n")
	if want := "state: one 2 711 0 a bin "; !strings.Contains(out.logs, want) || strings.Contains(out.logs, "gone") {
		t.Errorf("no %q in\n%s", want, out.logs)
	}
	if _, ran := build("RUN echo last\n").steps(); len(ran) > 1 {
		t.Errorf("ran again: %q", ran)
	}
}
