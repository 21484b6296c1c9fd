// SPDX-License-Identifier: Apache-2.0

package op

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
)

// TestEveryFieldIsDocumented: docs/llb.md says of each field of each message of the proto what is done with it, and of
// nothing else. A release of BuildKit with a new field makes it fail.
func TestEveryFieldIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/llb.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for line := range strings.Lines(string(page)) {
		cell, ok := strings.CutPrefix(line, "| ")
		if !ok {
			continue
		}
		cell, what, _ := strings.Cut(cell, " |")
		message, fields, ok := strings.Cut(cell, ": ")
		if !ok || strings.TrimSpace(strings.Trim(strings.TrimSpace(what), "|")) == "" {
			continue
		}
		for _, f := range strings.Split(fields, ", ") {
			documented = append(documented, message+"."+f)
		}
	}
	var known []string
	messages := pb.File_github_com_moby_buildkit_solver_pb_ops_proto.Messages()
	for i := range messages.Len() {
		m := messages.Get(i)
		for j := range m.Fields().Len() {
			known = append(known, string(m.Name())+"."+string(m.Fields().Get(j).Name()))
		}
	}
	for _, f := range known {
		if n := len(slices.DeleteFunc(slices.Clone(documented), func(d string) bool { return d != f })); n != 1 {
			t.Errorf("%s is there %d times", f, n)
		}
	}
	for _, f := range documented {
		if !slices.Contains(known, f) {
			t.Errorf("the proto has no %s", f)
		}
	}
	if len(known) < 100 {
		t.Errorf("only %d fields", len(known))
	}
}
