// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
)

// scriptLikeBuildkit runs one build with buildctl at real-buildkitd and at the script's own engine, and compares the shape of --metadata-file, and
// of the index.json of the archive OUT if there is one.
func scriptLikeBuildkit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: like-buildkit ARG... (of buildctl build; OUT is a file of each side)")
	}
	var sides [2][]string
	for i, address := range []string{ts.Getenv("BUILDKITD"), ts.Getenv("BUILDKIT_HOST")} {
		dir := ts.MkAbs(fmt.Sprint("side", i))
		ts.Check(os.RemoveAll(dir))
		ts.Check(os.MkdirAll(dir, 0o755))
		meta, out := dir+"/meta.json", dir+"/out"
		call := []string{"--addr", address, "build", "--progress", "plain", "--frontend", "dockerfile.v0", "--local", "context=.", "--local", "dockerfile=.", "--metadata-file", meta}
		for _, arg := range args {
			call = append(call, strings.ReplaceAll(arg, "OUT", out))
		}
		ts.Check(ts.Exec("buildctl", call...))
		raw, err := os.ReadFile(meta)
		switch {
		case err == nil:
			sides[i] = jsonShape(ts, raw)
		case os.IsNotExist(err): // there was nothing to tell
		default:
			ts.Check(err)
		}
		if raw = indexOfArchive(ts, out); raw != nil {
			sides[i] = append(append(sides[i], "index.json:"), jsonShape(ts, raw)...)
		}
	}
	if diff := cmp.Diff(sides[0], sides[1]); diff != "" {
		ts.Fatalf("%q: slipway (+) and BuildKit (-) say:\n%s", args, diff)
	}
}

// variable is what differs from build to build.
var variable = regexp.MustCompile(`sha256:[0-9a-f]{64}|\d{4}-\d\d-\d\dT[0-9:.]+Z`)

// jsonShape is a line for each value in a document: its path, and what it is.
func jsonShape(ts *testscript.TestScript, raw []byte) (lines []string) {
	var doc any
	ts.Check(json.Unmarshal(raw, &doc))
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, key := range slices.Sorted(maps.Keys(v)) {
				walk(path+"/"+key, v[key])
			}
		case []any:
			for _, item := range v {
				walk(path+"[]", item)
			}
		case string:
			lines = append(lines, path+" "+variable.ReplaceAllString(v, "?"))
		default:
			lines = append(lines, fmt.Sprintf("%s %T", path, v))
		}
	}
	walk("", doc)
	return lines
}

// indexOfArchive is the index.json of an archive, nil when there is none.
func indexOfArchive(ts *testscript.TestScript, archive string) []byte {
	f, err := os.Open(archive)
	if err != nil {
		return nil
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			return nil
		}
		if h.Name == "index.json" {
			raw, err := io.ReadAll(r)
			ts.Check(err)
			return raw
		}
	}
}
