// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAttestFlags(t *testing.T) {
	for _, tc := range []struct {
		o    attestOptions
		want map[string]string
	}{
		{attestOptions{}, map[string]string{}},
		{attestOptions{provenance: "true", sbom: "true"}, map[string]string{"attest:provenance": "", "attest:sbom": ""}},
		{attestOptions{provenance: "false", sbom: "0"}, map[string]string{}},
		{attestOptions{provenance: "mode=max,builder-id=x", sbom: "generator=a/b"}, map[string]string{"attest:provenance": "mode=max,builder-id=x", "attest:sbom": "generator=a/b"}},
		{attestOptions{attest: []string{"type=sbom", "type=provenance,mode=min"}}, map[string]string{"attest:sbom": "", "attest:provenance": "mode=min"}},
		{attestOptions{attest: []string{"type=provenance,mode=min"}, provenance: "false"}, map[string]string{}},
		{attestOptions{attest: []string{"type=sbom,disabled=true", "type=sbom,X=1"}}, map[string]string{"attest:sbom": "X=1"}},
		{attestOptions{attest: []string{`type=sbom,"X=1,2"`}}, map[string]string{"attest:sbom": `"X=1,2"`}},
	} {
		got := map[string]string{}
		if err := tc.o.addAttrs(got); err != nil {
			t.Errorf("%+v: %v", tc.o, err)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%+v: %s", tc.o, diff)
		}
	}
	for text, want := range map[string]string{
		"mode=max": "neither provenance nor sbom", "type=x": `"x"`, "type=sbom,loose": `"loose" is not KEY=VALUE`, "type=sbom,disabled=x": "disabled=x",
	} {
		if err := (attestOptions{attest: []string{text}}).addAttrs(map[string]string{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestShortProvenance(t *testing.T) {
	got, err := shortProvenance([]byte(`{"buildDefinition":{"buildType":"t","internalParameters":{"buildConfig":{},"builderPlatform":"p"}},"runDetails":{"metadata":{},"builder":{"id":""}}}`))
	want := `{"buildDefinition":{"buildType":"t","internalParameters":{"builderPlatform":"p"}},"runDetails":{"builder":{"id":""}}}`
	if err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := shortProvenance([]byte(`{}`)); err != nil {
		t.Error(err)
	}
}
