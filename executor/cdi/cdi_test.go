// SPDX-License-Identifier: Apache-2.0

package cdi

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestDevices(t *testing.T) {
	dir := t.TempDir()
	d := New([]string{filepath.Join(dir, "none"), dir}, []string{"vendor.test/free"})
	if found, err := d.Find("vendor.test/x=a"); err != nil || len(found) != 0 {
		t.Fatalf("without files: %v, %v", found, err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("x.json", `{"cdiVersion":"0.6.0","kind":"vendor.test/x","annotations":{"org.mobyproject.buildkit.device.class":"things"},"devices":[
		{"name":"a","containerEdits":{"env":["A=1"]}},
		{"name":"b","annotations":{"org.mobyproject.buildkit.device.autoallow":"true"},"containerEdits":{"env":["B=1"]}}]}`)
	write("free.yaml", "cdiVersion: 0.6.0\nkind: vendor.test/free\ndevices:\n- name: c\n  containerEdits:\n    env: [C=1]\n")
	write("broken.json", `{"cdiVersion":`)
	for name, want := range map[string]string{
		"vendor.test/x=a": "vendor.test/x=a", "vendor.test/x=*": "vendor.test/x=a vendor.test/x=b*", "vendor.test/x": "vendor.test/x=a",
		"things": "vendor.test/x=a vendor.test/x=b*", "vendor.test/free": "vendor.test/free=c*", "vendor.test/x=d": "", "nothing": "", "": "",
	} {
		found, err := d.Find(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var got []string
		for _, dev := range found {
			if dev.AutoAllowed {
				dev.Name += "*"
			}
			got = append(got, dev.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
	spec := &specs.Spec{Process: &specs.Process{Env: []string{"PATH=/"}}}
	if err := d.Inject(spec, []string{"vendor.test/x=b", "vendor.test/free=c"}); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(spec.Process.Env, "B=1") || !slices.Contains(spec.Process.Env, "C=1") || slices.Contains(spec.Process.Env, "A=1") {
		t.Errorf("environment %q", spec.Process.Env)
	}
	if err := d.Inject(spec, []string{"vendor.test/x=d"}); err == nil || !strings.Contains(err.Error(), "not here: vendor.test/x=d") {
		t.Errorf("missing: %v", err)
	}
}
