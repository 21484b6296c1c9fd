// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/seed-68981b69/slipway/engine/config"
)

// page is docs/compatibility.md: for each heading the status of each row, by the code in its first column.
func compatibilityPage(t *testing.T) map[string]map[string]string {
	t.Helper()
	data, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	page := map[string]map[string]string{}
	heading := ""
	for line := range strings.Lines(string(data)) {
		if h, ok := strings.CutPrefix(line, "## "); ok {
			heading = strings.TrimSpace(h)
			page[heading] = map[string]string{}
		}
		cells := strings.Split(line, "|")
		if len(cells) < 4 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			continue
		}
		_, name, _ := strings.Cut(cells[1], "`")
		name, _, _ = strings.Cut(name, "`")
		if _, twice := page[heading][name]; twice {
			t.Errorf("%s: two rows for %s", heading, name)
		}
		page[heading][name] = strings.TrimSpace(cells[2])
	}
	return page
}

// TestCompatibilityPage: each field, key and flag has a row, with what becomes of it, and no row is of something else.
func TestCompatibilityPage(t *testing.T) {
	page := compatibilityPage(t)
	check := func(heading string, want map[string]string) {
		t.Helper()
		rows := page[heading]
		for name, status := range want {
			switch got, ok := rows[name]; {
			case !ok:
				t.Errorf("%s: no row for %s", heading, name)
			case status != "" && got != status:
				t.Errorf("%s: %s is %q there, and really %q", heading, name, got, status)
			case !slices.Contains([]string{"done", "refused", "not sent", "no effect"}, got):
				t.Errorf("%s: %s is %q", heading, name, got)
			}
		}
		for name := range rows {
			if _, ok := want[name]; !ok {
				t.Errorf("%s: a row for %s, which there is not", heading, name)
			}
		}
	}
	check("control.proto", protoFields(&controlapi.SolveRequest{}))
	check("worker.proto", protoFields(&apitypes.WorkerRecord{}))
	check("gateway.proto", protoFields(&gwpb.SolveRequest{}))
	keys := map[string]string{}
	for _, k := range slices.Concat(config.Keys, config.OwnKeys) {
		keys[k.Path] = string(k.Status)
	}
	check("buildkitd.toml", keys)
	flags := map[string]string{}
	for _, f := range buildkitdFlags() {
		flags["--"+f.name] = f.status()
	}
	check("The buildkitd command line", flags)
}

// protoFields are all fields of the messages in the file of m; a message without fields is there by its own name.
func protoFields(m interface{ ProtoReflect() protoreflect.Message }) map[string]string {
	fields := map[string]string{}
	messages := m.ProtoReflect().Descriptor().ParentFile().Messages()
	for i := range messages.Len() {
		message := messages.Get(i)
		if message.Fields().Len() == 0 {
			fields[string(message.Name())] = ""
		}
		for j := range message.Fields().Len() {
			fields[string(message.Name())+"."+string(message.Fields().Get(j).Name())] = ""
		}
	}
	return fields
}

// status is what becomes of a flag, in the words of the page.
func (f buildkitdFlag) status() string {
	switch {
	case strings.HasPrefix(f.usage, "no effect"):
		return "no effect"
	case f.set == nil && f.name != "config":
		return "refused"
	}
	return "done"
}

// TestBuildkitdFlags compares our list of flags with those in the sources of buildkitd.
func TestBuildkitdFlags(t *testing.T) {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/buildkit").Output()
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]flagKind{"StringFlag": textFlag, "StringSliceFlag": listFlag, "BoolFlag": boolFlag, "IntFlag": numberFlag}
	theirs := map[string]flagKind{}
	for _, name := range []string{"main.go", "main_oci_worker.go", "main_containerd_worker.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(strings.TrimSpace(string(dir)), "cmd", "buildkitd", name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		variables := map[string]string{} // n := "oci-worker-rootless"
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				if v, ok := n.Lhs[0].(*ast.Ident); ok && len(n.Rhs) == 1 {
					if lit, ok := n.Rhs[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
						variables[v.Name], _ = strconv.Unquote(lit.Value)
					}
				}
			case *ast.CompositeLit:
				of, ok := n.Type.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				kind, ok := kinds[of.Sel.Name]
				if !ok {
					return true
				}
				for _, e := range n.Elts {
					kv, ok := e.(*ast.KeyValueExpr)
					if !ok || kv.Key.(*ast.Ident).Name != "Name" {
						continue
					}
					switch value := kv.Value.(type) {
					case *ast.BasicLit:
						flag, _ := strconv.Unquote(value.Value)
						theirs[flag] = kind
					case *ast.Ident:
						theirs[variables[value.Name]] = kind
					}
				}
			}
			return true
		})
	}
	if len(theirs) < 45 {
		t.Fatalf("only %d flags found: %v", len(theirs), theirs)
	}
	for _, f := range buildkitdFlags() {
		kind, ok := theirs[f.name]
		if !ok {
			t.Errorf("--%s: buildkitd has no such flag", f.name)
		} else if kind != f.kind {
			t.Errorf("--%s: its value is another one in buildkitd", f.name)
		}
		delete(theirs, f.name)
	}
	for name := range theirs {
		t.Errorf("--%s is missing", name)
	}
}
