// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/seed-68981b69/slipway/"

// floors are the folders of docs/architecture.md from the lowest up; folders of one floor never import each other.
var floors = [][]string{{"cache"}, {"executor"}, {"solver"}, {"frontend", "exporter"}, {"engine"}, {"cmd", "bench"}}

// banned are imports that would make a package know too much, each with the reason.
var banned = []struct{ pkg, imports, reason string }{
	{"cache", "moby/buildkit", "the store outlives the build protocol"},
	{"executor", "moby/buildkit", "a container is a container, whoever asked for it"},
	{"executor", module + "cache", "the caller mounts; the executor runs what is mounted"},
	{"cmd/slipway-runner", module + "cache", "the runner is re-executed for every container and must stay small"},
	{"cmd/slipway-runner", module + "solver", "the runner is re-executed for every container and must stay small"},
	{"cmd/slipway-runner", "moby/buildkit", "the runner is re-executed for every container and must stay small"},
	{"cmd/slipway-runner", "google.golang.org/grpc", "the runner is re-executed for every container and must stay small"},
}

func floorOf(folder string) int {
	return slices.IndexFunc(floors, func(f []string) bool { return slices.Contains(f, folder) })
}

// TestImportsGoDown keeps the walls of the house: a package imports only from lower folders or its own. It parses the
// files itself, tests included, so that go test's cache notices every change.
func TestImportsGoDown(t *testing.T) {
	packages := 0
	for _, top := range slices.Concat(floors...) {
		err := filepath.WalkDir(filepath.Join("..", "..", top), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
			if err != nil {
				return err
			}
			packages++
			pkg := filepath.ToSlash(strings.TrimPrefix(filepath.Dir(path), "../../"))
			for _, spec := range file.Imports {
				checkImport(t, pkg, strings.Trim(spec.Path.Value, `"`), strings.HasSuffix(path, "_test.go"))
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if packages < 100 {
		t.Fatalf("found only %d Go files: the test looks in the wrong place", packages)
	}
}

func checkImport(t *testing.T, pkg, imported string, inTest bool) {
	folder, _, _ := strings.Cut(pkg, "/")
	for _, b := range banned {
		if !inTest && (pkg == b.pkg || strings.HasPrefix(pkg, b.pkg+"/")) && strings.Contains(imported, b.imports) {
			t.Errorf("%s imports %s: %s", pkg, imported, b.reason)
		}
	}
	ours, ok := strings.CutPrefix(imported, module)
	if !ok {
		return
	}
	other, _, _ := strings.Cut(ours, "/")
	if floorOf(other) < 0 {
		t.Errorf("%s imports %s, which is in no folder of the house", pkg, ours)
	}
	if other != folder && floorOf(other) >= floorOf(folder) {
		t.Errorf("%s imports %s: imports go down (%v)", pkg, ours, floors)
	}
}
