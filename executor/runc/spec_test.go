// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/seed-68981b69/slipway/executor"
)

var update = flag.Bool("update", false, "rewrite testdata")

// testHost is a machine that is the same everywhere.
func testHost() host {
	mode := os.FileMode(0o660)
	uid, gid := uint32(0), uint32(6)
	return host{
		Capabilities:     capabilityNames,
		CgroupNamespace:  true,
		CgroupParent:     "slipway-01234567",
		NetworkNamespace: "/proc/1/fd/9",
		Runner:           "/state/slipway-runner",
		Files: []generatedFile{
			{"/run/f/resolv.conf", "/etc/resolv.conf"}, {"/run/f/hostname", "/etc/hostname"}, {"/run/f/hosts", "/etc/hosts"},
		},
		Devices: []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8, FileMode: &mode, UID: &uid, GID: &gid}},
		Seccomp: func(s *specs.Spec) (*specs.LinuxSeccomp, error) {
			return &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_FOR_TEST"}, nil
		},
	}
}

func TestRuntimeSpec(t *testing.T) {
	for _, tc := range []struct {
		name string
		spec executor.Spec
	}{
		{"step", executor.Spec{
			ID: "step1", Rootfs: "/root/fs", Args: []string{"/bin/sh", "-c", "make"}, Env: []string{"PATH=/bin", "A=b"},
			Cwd: "/src/", Hostname: "buildkitsandbox", Network: executor.NetworkBridge, NoNewPrivileges: true,
			Mounts: []executor.Mount{
				{Kind: executor.MountBind, Source: "/ctx", Target: "/src", Readonly: true, Recursive: true},
				{Kind: executor.MountTmpfs, Target: "/tmp/", SizeBytes: 4096, Mode: 0o700, NoExec: true},
			},
		}},
		{"container", executor.Spec{
			ID: "c1", Rootfs: "/fs", ReadonlyRootfs: true, Args: []string{"server"}, Cwd: "/", Terminal: true, Init: true,
			User:     executor.User{UID: 1000, GID: 100, AdditionalGroups: []uint32{4, 100, 5}},
			Hostname: "web", Network: executor.NetworkNone, CapAdd: []string{"net_admin"}, CapDrop: []string{"CAP_MKNOD", "kill"},
			Ulimits: []executor.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}}, ShmSize: 1 << 20, CgroupParent: "/../team",
			Resources: executor.Resources{
				MemoryBytes: 1 << 30, MemorySwapBytes: 2 << 30, CPUShares: 512, CPUPeriod: 100000, CPUQuota: 50000,
				CpusetCpus: "0-1", CpusetMems: "0", PidsLimit: 100,
			},
			Mounts: []executor.Mount{
				{Kind: executor.MountBind, Source: "/my/hosts", Target: "/etc/hosts"},
				{Kind: executor.MountBind, Source: "/data", Target: "/data", Recursive: true},
				{Kind: executor.MountTmpfs, Target: "/dev/shm"},
			},
		}},
		{"privileged", executor.Spec{
			ID: "p1", Rootfs: "/fs", Args: []string{"dockerd"}, Cwd: "/", Hostname: "p", Network: executor.NetworkHost, Privileged: true,
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec, err := runtimeSpec(tc.spec, testHost())
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(spec, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", tc.name+".json")
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(strings.TrimSpace(string(want)), string(got)); d != "" {
				t.Errorf("runtime spec (-want +got), -update accepts it:\n%s", d)
			}
		})
	}
}

func TestRuntimeSpecRefuses(t *testing.T) {
	for _, tc := range []struct {
		want   string
		change func(*executor.Spec)
	}{
		{`container ID "a/b"`, func(s *executor.Spec) { s.ID = "a/b" }},
		{`container ID ".."`, func(s *executor.Spec) { s.ID = ".." }},
		{`root file system "rel"`, func(s *executor.Spec) { s.Rootfs = "rel" }},
		{`no command`, func(s *executor.Spec) { s.Args = nil }},
		{`working directory "rel"`, func(s *executor.Spec) { s.Cwd = "rel" }},
		{`host name`, func(s *executor.Spec) { s.Hostname = strings.Repeat("x", 65) }},
		{`network mode "container:x" is not supported yet`, func(s *executor.Spec) { s.Network = "container:x" }},
		{`network mode "" is not supported yet`, func(s *executor.Spec) { s.Network = "" }},
		{`zero byte`, func(s *executor.Spec) { s.Args = []string{"a\x00b"} }},
		{`environment variable "A" contains a zero byte`, func(s *executor.Spec) { s.Env = []string{"A=secret\x00"} }},
		{`environment variable has no name`, func(s *executor.Spec) { s.Env = []string{"=secret"} }},
		{`unknown capability "fly"`, func(s *executor.Spec) { s.CapAdd = []string{"fly"} }},
		{`capability CAP_SYS_TIME cannot be added`, func(s *executor.Spec) { s.CapAdd = []string{"SYS_TIME"} }},
		{`unknown ulimit "files"`, func(s *executor.Spec) { s.Ulimits = []executor.Ulimit{{Name: "files"}} }},
		{`ulimit nofile: the soft limit 2 is above`, func(s *executor.Spec) { s.Ulimits = []executor.Ulimit{{Name: "nofile", Soft: 2, Hard: 1}} }},
		{`mount target "rel"`, func(s *executor.Spec) { s.Mounts = []executor.Mount{{Kind: executor.MountTmpfs, Target: "rel"}} }},
		{`mount source "rel"`, func(s *executor.Spec) {
			s.Mounts = []executor.Mount{{Kind: executor.MountBind, Source: "rel", Target: "/x"}}
		}},
		{`systemd slices are not supported yet`, func(s *executor.Spec) { s.CgroupParent = "system.slice" }},
	} {
		s := executor.Spec{ID: "x", Rootfs: "/fs", Args: []string{"true"}, Network: executor.NetworkHost}
		tc.change(&s)
		h := testHost()
		h.Capabilities = slices.DeleteFunc(slices.Clone(h.Capabilities), func(c string) bool { return c == "CAP_SYS_TIME" })
		if _, err := runtimeSpec(s, h); err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("error %v, want one with %q", err, tc.want)
		}
	}
	var startErr *executor.StartError
	if _, err := runtimeSpec(executor.Spec{ID: "x", Rootfs: "/"}, testHost()); !errors.As(err, &startErr) || startErr.Code != 127 {
		t.Errorf("no command: %v, want a start error with code 127", err)
	}
}

func TestCapabilities(t *testing.T) {
	all := capabilityNames
	for _, tc := range []struct {
		add, drop []string
		want      int // how many
		has, not  string
	}{
		{want: 14, has: "CAP_CHOWN", not: "CAP_SYS_ADMIN"},
		{drop: []string{"ALL"}, want: 0},
		{drop: []string{"all"}, add: []string{"chown"}, want: 1, has: "CAP_CHOWN"},
		{add: []string{"ALL"}, want: len(all), has: "CAP_SYS_ADMIN"},
		{add: []string{"ALL"}, drop: []string{"SYS_ADMIN"}, want: len(all) - 1, not: "CAP_SYS_ADMIN"},
		{add: []string{"SYS_ADMIN"}, drop: []string{"SYS_ADMIN"}, want: 14, not: "CAP_SYS_ADMIN"},
	} {
		got, err := capabilities(false, tc.add, tc.drop, all)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != tc.want || tc.has != "" && !slices.Contains(got, tc.has) || slices.Contains(got, tc.not) {
			t.Errorf("add %v, drop %v: %v", tc.add, tc.drop, got)
		}
	}
}

func TestNativeSeccomp(t *testing.T) {
	var profiles seccompProfiles
	names := func(caps []string) (allowed []string) {
		spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}}
		p, err := profiles.native(spec)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Architectures) != 1 || p.DefaultAction != specs.ActErrno {
			t.Errorf("architectures %v, default %v", p.Architectures, p.DefaultAction)
		}
		for _, s := range p.Syscalls {
			if s.Action == specs.ActAllow && len(s.Args) == 0 {
				allowed = append(allowed, s.Names...)
			}
		}
		return allowed
	}
	if got := names(defaultCapabilities); !slices.Contains(got, "openat") || slices.Contains(got, "mount") || slices.Contains(got, "bpf") {
		t.Error("default capabilities: want openat, not mount and bpf")
	}
	if got := names(append([]string{"CAP_SYS_ADMIN"}, defaultCapabilities...)); !slices.Contains(got, "mount") {
		t.Error("with CAP_SYS_ADMIN: want mount")
	}
}

func TestExecFailure(t *testing.T) {
	for text, want := range map[string]int{
		"exec /x: exec format error\n":           126,
		"exec /x: permission denied\r\n":         126,
		"exec /x: no such file or directory\n":   127,
		"exec /x: no such file or directory":     0,
		"one\nexec /x: exec format error\n":      0,
		"exec /x: exec format error\nand more\n": 0,
		"":                                       0,
	} {
		o := newOutput(nil, nil)
		o.deliver([]byte(text))
		s := &stdio{outputs: []*output{newOutput(nil, nil), o}}
		if code, failed := s.execFailure(); code != want || failed != (want != 0) {
			t.Errorf("execFailure(%q) = %d, %v; want %d", text, code, failed, want)
		}
	}
}

// Steps are started one at a time; this is what one costs.
func BenchmarkRuntimeSpec(b *testing.B) {
	h := testHost()
	var profiles seccompProfiles
	h.Seccomp = profiles.native
	s := executor.Spec{ID: "x", Rootfs: "/fs", Args: []string{"true"}, Network: executor.NetworkHost}
	for b.Loop() {
		spec, err := runtimeSpec(s, h)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := profiles.encode(spec); err != nil {
			b.Fatal(err)
		}
	}
}
