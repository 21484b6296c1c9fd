// SPDX-License-Identifier: Apache-2.0

package blob_test

import (
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/source/blob"
)

const sum = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

func vertex(id string, attrs map[string]string) *solver.Vertex {
	return &solver.Vertex{Op: &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: id, Attrs: attrs}}}}
}

// What builds with blobs make is tested in engine (TestBlobSources).
func TestRefuses(t *testing.T) {
	for _, tc := range []struct {
		id    string
		attrs map[string]string
		say   string
	}{
		{"docker-image+blob://a", nil, "has no digest"},
		{"docker-image+blob://a:tag@" + sum, nil, "has a tag"},
		{"docker-image+blob://UPPER@" + sum, nil, "UPPER"},
		{"docker-image+blob://a@" + sum, map[string]string{"http.perm": "01000000"}, `http.perm: invalid number "01000000"`},
		{"docker-image+blob://a@" + sum, map[string]string{"http.uid": "-1"}, `invalid number "-1"`},
		{"docker-image+blob://a@" + sum, map[string]string{pb.AttrImageRecordType: "odd"}, "invalid record type"},
		{"docker-image+blob://a@" + sum, map[string]string{pb.AttrOCILayoutStoreID: "x"}, "oci.store: not supported yet"},
		{"docker-image+blob://a@" + sum, map[string]string{pb.AttrHTTPChecksum: sum}, "http.checksum: not supported yet"},
		{"oci-layout+blob://a@" + sum, nil, "which layout is meant"},
	} {
		if _, err := blob.New(blob.Deps{})(vertex(tc.id, tc.attrs)); err == nil || !strings.Contains(err.Error(), tc.say) {
			t.Errorf("%s %v: %v, want %q", tc.id, tc.attrs, err, tc.say)
		}
	}
}

// Where a blob comes from is not part of what it is; its name, mode and owner are.
func TestKey(t *testing.T) {
	key := func(id string, attrs map[string]string) string {
		src, err := blob.New(blob.Deps{})(vertex(id, attrs))
		if err != nil {
			t.Fatal(err)
		}
		pin, err := src.Pin(t.Context(), &solver.Env{})
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, p := range append(src.Parts(), pin.Parts...) {
			b.WriteString(p.Name + "=" + p.Value + "\n")
		}
		return b.String()
	}
	base := key("docker-image+blob://a@"+sum, nil)
	for _, same := range []string{
		key("docker-image+blob://example.com/b@"+sum, map[string]string{pb.AttrImageRecordType: "internal"}),
		key("oci-layout+blob://c@"+sum, map[string]string{pb.AttrOCILayoutStoreID: "x", pb.AttrOCILayoutSessionID: "y"}),
	} {
		if same != base {
			t.Errorf("%s and %s differ", same, base)
		}
	}
	for name, value := range map[string]string{pb.AttrHTTPFilename: "f", pb.AttrHTTPPerm: "0755", pb.AttrHTTPUID: "1", pb.AttrHTTPGID: "1"} {
		if key("docker-image+blob://a@"+sum, map[string]string{name: value}) == base {
			t.Errorf("%s=%s is not in the key", name, value)
		}
	}
}
