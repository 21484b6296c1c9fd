// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseLayout(t *testing.T) {
	t.Chdir(t.TempDir())
	one, two, only := digest.FromString("1"), digest.FromString("2"), digest.FromString("only")
	for dir, index := range map[string]string{
		"l":     `{"manifests":[{"digest":"` + one.String() + `","annotations":{"` + ocispec.AnnotationRefName + `":"v1"}},{"digest":"` + two.String() + `","annotations":{"` + containerdName + `":"latest"}}]}`,
		"a:b@c": `{"manifests":[{"digest":"` + only.String() + `"}]}`,
		"bad":   `{`,
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir("empty", 0o755); err != nil {
		t.Fatal(err)
	}
	for spec, want := range map[string]string{
		"l:v1": one.String(), "l": two.String(), "./l:latest": two.String(), "l@" + only.String(): only.String(), "l:v1@" + two.String(): two.String(),
		"a:b@c": only.String(), "a:b@c@" + one.String(): one.String(),
		"l:v2": `has no image "v2"`, "l@sha256:1": "OCI layout l@sha256: no such file", "nowhere": "nowhere", "nowhere:x": "nowhere", "empty:x": "is not an OCI layout",
		"bad:x": "index.json", "a:b@c:v1": `has no image "v1"`,
	} {
		l, err := parseLayout(spec)
		var got digest.Digest
		if err == nil {
			got, err = l.target()
		}
		if err == nil && got.String() != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %s, %v, want %s", spec, got, err, want)
		}
	}
}

func TestLayoutBlobsAreReadOnly(t *testing.T) {
	l := layoutBlobs(t.TempDir())
	fifo := digest.FromString("a pipe")
	path, err := l.path(fifo)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), syscall.Mkfifo(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.ReaderAt(t.Context(), ocispec.Descriptor{Digest: fifo}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
	if _, err := l.Info(t.Context(), digest.FromString("x")); !cerrdefs.IsNotFound(err) {
		t.Errorf("a missing blob: %v", err)
	}
	if _, err := l.Info(t.Context(), "sha256:../../../etc/passwd"); !cerrdefs.IsInvalidArgument(err) {
		t.Errorf("no digest: %v", err)
	}
	if _, err := l.Writer(t.Context()); !cerrdefs.IsNotImplemented(err) {
		t.Errorf("Writer: %v", err)
	}
	if err := l.Delete(t.Context(), fifo); !cerrdefs.IsNotImplemented(err) {
		t.Errorf("Delete: %v", err)
	}
}
