// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	upstream "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/util/disk"

	"github.com/seed-68981b69/slipway/cache"
)

// keysOf lists the keys of a struct of BuildKit's.
func keysOf(prefix string, t reflect.Type, add func(string)) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct {
		t = t.Elem()
	}
	text := reflect.TypeFor[interface{ UnmarshalText([]byte) error }]()
	switch {
	case reflect.PointerTo(t).Implements(text):
		add(prefix)
	case t.Kind() == reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
			switch {
			case f.Anonymous:
				keysOf(prefix, f.Type, add)
			case name != "" && name != "-":
				keysOf(strings.TrimPrefix(prefix+"."+name, "."), f.Type, add)
			}
		}
	case t.Kind() == reflect.Map:
		keysOf(prefix+".*", t.Elem(), add)
	default:
		add(prefix)
	}
}

// TestEveryKey compares Keys with the keys that BuildKit has, and what is done with the fields of Config.
func TestEveryKey(t *testing.T) {
	theirs := map[string]bool{}
	keysOf("", reflect.TypeFor[upstream.Config](), func(k string) { theirs[k] = true })
	if len(theirs) < 60 {
		t.Fatalf("only %d keys found: %v", len(theirs), theirs)
	}
	for k := range theirs {
		if find(strings.Split(k, ".")) == nil && !strings.HasPrefix(k, containerdKeys) {
			t.Errorf("BuildKit's key %s is not in Keys", k)
		}
	}
	ours := map[string]bool{}
	keysOf("", reflect.TypeFor[Config](), func(k string) { ours[k] = true })
	for _, k := range Keys {
		base := strings.TrimSuffix(k.Path, ".*")
		if !theirs[k.Path] && !slices.ContainsFunc(slices.Collect(mapKeys(theirs)), func(s string) bool { return strings.HasPrefix(s, base+".") }) {
			t.Errorf("Keys has %s, which BuildKit does not", k.Path)
		}
		if k.Status == Done && !ours[k.Path] {
			t.Errorf("%s is said to be done, but Config has no field for it", k.Path)
		}
		if k.Status != Done && k.Why == "" {
			t.Errorf("%s: no reason", k.Path)
		}
	}
}

func mapKeys(m map[string]bool) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// TestReferenceExample reads the example of BuildKit's documentation, which has every key. What we refuse of it is what Keys says.
func TestReferenceExample(t *testing.T) {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/buildkit").Output()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "docs", "buildkitd.toml.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(page), "```toml\n")
	text, _, _ = strings.Cut(text, "```")
	_, err = parse([]byte(text))
	if err == nil {
		t.Fatal("nothing refused")
	}
	var lines []string
	for _, line := range strings.Split(err.Error(), "\n") {
		name, _, _ := strings.Cut(line, " ")
		lines = append(lines, name)
	}
	want := []string{"proxyNetwork", "worker.containerd.enabled"}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("refused (-want +got):\n%s\n%v", diff, err)
	}
	// Without those it is read like BuildKit reads it.
	for _, line := range []string{
		"proxyNetwork = true",
	} {
		if !strings.Contains(text, line) {
			t.Fatalf("the example has changed: no %q", line)
		}
		text = strings.ReplaceAll(text, line, "")
	}
	text = strings.Replace(text, "containerd.sock\"\n  enabled = true", "containerd.sock\"\n  enabled = false", 1)
	ours, err := parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := upstream.Load(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	oci := ours.Worker.OCI
	for _, c := range []struct {
		name      string
		got, want any
	}{
		{"root", ours.Root, theirs.Root},
		{"provenanceEnvDir", ours.ProvenanceEnvDir, theirs.ProvenanceEnvDir},
		{"insecure-entitlements", ours.Entitlements, theirs.Entitlements},
		{"log", ours.Log.Level + ours.Log.Format, theirs.Log.Level + theirs.Log.Format},
		{"grpc.address", ours.GRPC.Address, theirs.GRPC.Address},
		{"grpc.gid", ours.GRPC.GID, theirs.GRPC.GID},
		{"grpc.tls", []string{ours.GRPC.TLS.Cert, ours.GRPC.TLS.Key, ours.GRPC.TLS.CA}, []string{theirs.GRPC.TLS.Cert, theirs.GRPC.TLS.Key, theirs.GRPC.TLS.CA}},
		{"grpc.debugAddress", ours.GRPC.DebugAddress, theirs.GRPC.DebugAddress},
		{"otel", ours.OTEL.SocketPath, theirs.OTEL.SocketPath},
		{"history.maxAge", ours.History.MaxAge.Duration, theirs.History.MaxAge.Duration},
		{"history.maxEntries", ours.History.MaxEntries, theirs.History.MaxEntries},
		{"labels", oci.Labels, theirs.Workers.OCI.Labels},
		{"platforms", oci.Platforms, theirs.Workers.OCI.Platforms},
		{"max-parallelism", oci.MaxParallelism, theirs.Workers.OCI.MaxParallelism},
		{"cniPoolSize", oci.NetworkPoolSize, theirs.Workers.OCI.CNIPoolSize},
		{"mirrors", ours.Hosts()["docker.io"].Mirrors, theirs.Registries["docker.io"].Mirrors},
		{"http", ours.Hosts()["yourmirror.local:5000"].HTTP, theirs.Registries["yourmirror.local:5000"].PlainHTTP},
		{"keypair", ours.Hosts()["docker.io"].KeyPairs[0].Cert, theirs.Registries["docker.io"].KeyPairs[0].Certificate},
		{"cdi", ours.CDI.SpecDirs, theirs.CDI.SpecDirs},
		{"dns", ours.DNS.Nameservers, theirs.DNS.Nameservers},
		{"sessionAuthTimeout", ours.System.SessionAuthTimeout.Duration, theirs.System.SessionAuthTimeout.Duration},
		{"maxRegistryConcurrency", ours.System.MaxRegistryConcurrency, theirs.System.MaxRegistryConcurrency},
	} {
		if diff := cmp.Diff(c.want, c.got); diff != "" {
			t.Errorf("%s (-BuildKit +ours):\n%s", c.name, diff)
		}
	}
	for _, w := range ours.Warnings {
		if strings.Contains(w, "unknown") {
			t.Errorf("warning: %s", w)
		}
	}
}

// TestPolicies compares the rules of garbage collection with BuildKit's own computation.
func TestPolicies(t *testing.T) {
	for _, text := range []string{
		"",
		"gckeepstorage = 5000000000",
		"reservedSpace = \"30%\"\nmaxUsedSpace = \"60%\"\nminFreeSpace = \"20GB\"",
		"maxUsedSpace = 123",
		"reservedSpace = 1\ngckeepstorage = 7",
		"[[worker.oci.gcpolicy]]\nkeepBytes = \"1GB\"\nkeepDuration = \"48h\"\nfilters = [\"type==source.local\"]\n" +
			"[[worker.oci.gcpolicy]]\nall = true\nreservedSpace = 1024000000\nkeepBytes = 3\nmaxUsedSpace = \"10%\"\nminFreeSpace = \"5%\"\nkeepDuration = 3600",
	} {
		text = "[worker.oci]\n" + text
		size := cache.Disk{Total: 333e9, Free: 100e9}
		c, err := parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		got := c.Worker.OCI.Policies(size)
		if got == nil {
			got = cache.DefaultPolicies(size)
		}
		theirs, err := upstream.Load(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		stat := disk.DiskStat{Total: size.Total, Free: size.Free, Available: size.Free}
		rules := theirs.Workers.OCI.GCPolicy
		if len(rules) == 0 {
			rules = upstream.DefaultGCPolicy(theirs.Workers.OCI.GCConfig, stat)
		}
		var want []cache.Policy
		for _, r := range rules {
			if r.ReservedSpace == (upstream.DiskSpace{}) {
				//lint:ignore SA1019 what BuildKit does
				r.ReservedSpace = r.KeepBytes
			}
			want = append(want, cache.Policy{
				All: r.All, Filters: r.Filters, KeepDuration: r.KeepDuration.Duration,
				ReservedSpace: r.ReservedSpace.AsBytes(stat), MaxUsedSpace: r.MaxUsedSpace.AsBytes(stat), MinFreeSpace: r.MinFreeSpace.AsBytes(stat),
			})
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s\n(-BuildKit +ours):\n%s", text, diff)
		}
	}
}

func TestKeepStorage(t *testing.T) {
	var o OCI
	if err := o.KeepStorage("100,200,300"); err != nil {
		t.Fatal(err)
	}
	if o.ReservedSpace.Bytes != 100e6 || o.MinFreeSpace.Bytes != 200e6 || o.MaxUsedSpace.Bytes != 300e6 {
		t.Errorf("%+v", o)
	}
	for _, bad := range []string{"", "x", "1,2,3,4", "-1"} {
		if o.KeepStorage(bad) == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"x = ":                                 "line 1",
		"root = 5":                             "line 1",
		"proxyNetwork = true":                  "proxyNetwork = true is not supported",
		"insecure-entitlements = [\"fly\"]":    `insecure-entitlements: invalid entitlement "fly"`,
		"[log]\nformat = \"xml\"":              `log.format: "xml"`,
		"[log]\nlevel = \"loud\"":              `log.level: "loud"`,
		"[worker.oci]\nenabled = false":        "worker.oci.enabled = false is not supported",
		"[worker.oci]\nsnapshotter = \"zfs\"":  "worker.oci.snapshotter = zfs",
		"[worker.oci]\nSnapshotter = \"zfs\"":  "worker.oci.Snapshotter = zfs",
		"[worker.oci]\ngckeepstorage = \"x\"":  "invalid disk space",
		"[worker.oci]\nmax-parallelism = -1":   "worker.oci.max-parallelism",
		"[worker.containerd]\nenabled = true":  "worker.containerd.enabled",
		"[system]\nmaxRegistryConcurrency = 0": "system.maxRegistryConcurrency",
		"[history]\nmaxAge = \"soon\"":         "invalid duration",
		"[history]\nmaxEntries = -1":           "history.maxEntries",
		"[cache.gha.verify]\nrequired = true":  "cache.gha.verify.required = true",
		"[worker.oci.stargzSnapshotter]\nx = 1\n[worker.oci]\nselinux = true": "worker.oci.selinux = true is not supported",
	} {
		if _, err := parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q", text, err, want)
		}
	}
	for _, text := range []string{
		"", "proxyNetwork = false", "[worker.oci]\nenabled = true\nsnapshotter = \"overlayfs\"\nbinary = \"\"\nrootless = true",
		"[worker.containerd]\nenabled = false\nnamespace = \"x\"", "[cdi]\ndisabled = true", "[cdi]\ndisabled = false\nspecDirs = []",
	} {
		if _, err := parse([]byte(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestWarnings(t *testing.T) {
	c, err := parse([]byte("rot = 1\n[worker.oci]\nspeed = 9\n[worker.containerd]\naddress = \"x\"\n[system]\nplatformsCacheMaxAge = \"1h\"\n[registry.\"a.b:5\"]\nhtp = true\n[compaction]\nenabled = true\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"compaction.enabled has no effect: the engine's database tidies itself up",
		"unknown key registry.a.b:5.htp",
		"unknown key rot",
		"system.platformsCacheMaxAge has no effect: platforms are looked up each time",
		"worker.containerd.address has no effect: the engine does not use containerd",
		"unknown key worker.oci.speed",
	}
	if diff := cmp.Diff(want, c.Warnings); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestLoadFirst(t *testing.T) {
	dir := t.TempDir()
	second := filepath.Join(dir, "second.toml")
	if err := os.WriteFile(second, []byte("root = \"/here\"\n[log]\nlevel = \"info\"\n[history]\nmaxAge = \"90s\""), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadFirst(filepath.Join(dir, "first.toml"), second)
	if err != nil || c.Root != "/here" || c.Path != second || c.History.MaxAge.Duration != 90*time.Second {
		t.Errorf("%+v, %v", c, err)
	}
	if l, err := c.LogLevel(); err != nil || l != slog.LevelInfo {
		t.Errorf("level %v, %v", l, err)
	}
	if c, err := LoadFirst(filepath.Join(dir, "first.toml")); err != nil || c.Path != "" {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := Load(filepath.Join(dir, "first.toml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	if _, err := LoadFirst(dir); err == nil {
		t.Error("a directory was read")
	}
}
