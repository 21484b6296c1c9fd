// SPDX-License-Identifier: Apache-2.0

package attestation

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/result"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/exporter"
)

// files is a small tree in memory: paths to contents, which for symlinks begin with "->".
type files struct {
	*index.Index
	content map[string]string
}

func newFiles(content map[string]string) files {
	entries := []index.Entry{{Type: index.Dir, Mode: 0o755}}
	for name, text := range content {
		e := index.Entry{Path: name, Type: index.File, Mode: 0o644, Size: int64(len(text)), Digest: digest.FromString(text), Offset: -1}
		if target, ok := strings.CutPrefix(text, "->"); ok {
			e = index.Entry{Path: name, Type: index.Symlink, Mode: 0o777, Target: target, Offset: -1}
		}
		entries = append(entries, e)
	}
	return files{index.New(entries), content}
}

func (f files) OpenFile(_ context.Context, path string) (io.ReadCloser, error) {
	text, ok := f.content[path]
	if !ok {
		return nil, errors.New("no such file")
	}
	return io.NopCloser(strings.NewReader(text)), nil
}

func TestReadOrdersAndResolves(t *testing.T) {
	statement := func(predicate string) string {
		return `{"_type":"x","predicateType":"https://spdx.dev/Document","subject":[{"name":"n","digest":{"gitCommit":"AbC"}}],"predicate":` + predicate + `}`
	}
	tree := newFiles(map[string]string{
		"out/sbom.spdx.json": statement(`{"a":1}`), "out/sbom-x.spdx.json": statement(`{"a":2}`), "link": "->/out", "p": "->../../outside", "outside": "{}",
	})
	list, err := Read(t.Context(), []Given{
		{Kind: gwpb.AttestationKind_InToto, Path: "p", Ref: tree, InToto: result.InTotoAttestation{PredicateType: "t"}},
		{
			Kind: gwpb.AttestationKind_Bundle, Path: "/link", Ref: tree, InToto: result.InTotoAttestation{PredicateType: "https://spdx.dev/Document"},
			Metadata: map[string][]byte{result.AttestationSBOMCore: []byte("sbom"), result.AttestationInlineOnlyKey: []byte("true")},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 3 || !list[0].CoreSBOM || list[0].Path != "/link/sbom.spdx.json" || list[1].Path != "p" || list[2].CoreSBOM || !list[2].InlineOnly || list[1].InlineOnly {
		t.Fatalf("%+v", list)
	}
	predicate, err := list[0].Predicate(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewStatement(list[0], predicate, []Subject{{"self", digest.FromString("self")}})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if want := `{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://spdx.dev/Document","subject":[{"name":"n","digest":{"gitCommit":"AbC"}}],"predicate":{"a":1}}`; err != nil || string(raw) != want {
		t.Errorf("%s, %v", raw, err)
	}
}

func TestStatementsAboutTheResult(t *testing.T) {
	self := []Subject{{"a", digest.FromString("a")}, {"b", digest.FromString("b")}}
	for _, tc := range []struct {
		given []result.InTotoSubject
		want  string
	}{
		{nil, "a b"},
		{[]result.InTotoSubject{{Kind: gwpb.InTotoSubjectKind_Self, Name: "me"}}, "a me b me"},
		{[]result.InTotoSubject{{Kind: gwpb.InTotoSubjectKind_Raw, Digest: []digest.Digest{"sha1:x"}}}, "_"},
	} {
		s, err := NewStatement(exporter.Attestation{Subjects: tc.given}, json.RawMessage("null"), self)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, sub := range s.Subject {
			names = append(names, sub.Name)
		}
		if got := strings.Join(names, " "); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.given, got, tc.want)
		}
	}
	for _, bad := range []result.InTotoSubject{{Kind: 7}, {Kind: gwpb.InTotoSubjectKind_Raw, Digest: []digest.Digest{""}}, {Kind: gwpb.InTotoSubjectKind_Raw, Digest: []digest.Digest{":x"}}} {
		if _, err := NewStatement(exporter.Attestation{Subjects: []result.InTotoSubject{bad}}, nil, self); err == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// FuzzBundle: whatever a frontend returns, it is refused, or there is a statement of it that is JSON and no provenance.
func FuzzBundle(f *testing.F) {
	f.Add([]byte(`{"predicateType":"t","subject":[{"name":"n","digest":{"sha256":"0"}}],"predicate":{"a":[1,"<"]}}`))
	f.Add([]byte(`{"predicateType":"https://slsa.dev/provenance/v1","predicate":null}`))
	f.Add([]byte(`{"subject":[{"digest":{"":""}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := Read(t.Context(), []Given{{Kind: gwpb.AttestationKind_Bundle, Ref: newFiles(map[string]string{"s": string(data)})}})
		if err != nil {
			return
		}
		for _, a := range list {
			if strings.HasPrefix(a.PredicateType, ProvenancePrefix) {
				t.Errorf("provenance: %s", data)
			}
			predicate, err := a.Predicate(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			s, err := NewStatement(a, predicate, nil)
			if err != nil {
				continue
			}
			if _, err := json.Marshal(s); err != nil {
				t.Errorf("%s: %v", data, err)
			}
		}
	})
}

// TestReadIsBounded: what frontends say about a result is in memory, all of it.
func TestReadIsBounded(t *testing.T) {
	tree := newFiles(map[string]string{"a/1": `{"predicate":1}`, "a/2": `{"predicate":2}`, "b": `{"c":"d"}`})
	given := []Given{
		{Kind: gwpb.AttestationKind_Bundle, Path: "a", Ref: tree},
		{Kind: gwpb.AttestationKind_InToto, Path: "b", Ref: tree, InToto: result.InTotoAttestation{PredicateType: "t"}},
	}
	const all = 15 + 15 + 9
	if list, err := readAll(t.Context(), given, &reader{left: all}); err != nil || len(list) != 3 {
		t.Errorf("%d attestations, %v", len(list), err)
	}
	for _, left := range []int64{all - 1, 29, 14} {
		if _, err := readAll(t.Context(), given, &reader{left: left}); err == nil || !strings.Contains(err.Error(), "together") {
			t.Errorf("%d bytes: %v", left, err)
		}
	}
}
