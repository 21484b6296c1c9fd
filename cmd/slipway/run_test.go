// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/docker/cli/opts"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// parseRun parses a command line of `slipway run` without running it.
func parseRun(t *testing.T, args ...string) (*container.Config, *container.HostConfig, error) {
	t.Helper()
	o := &runOptions{ulimits: opts.NewUlimitOpt(nil)}
	flags := pflag.NewFlagSet("run", pflag.ContinueOnError)
	o.define(flags)
	if err := flags.Parse(args); err != nil {
		return nil, nil, err
	}
	req, err := o.request(flags, flags.Arg(0), flags.Args()[1:])
	return req.Config, req.HostConfig, err
}

func TestRunFlags(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("PASSED", "on")
	if err := os.WriteFile("env", []byte("# comment\nFILE=1\nPASSED\nOVER=file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, h, err := parseRun(t, "--rm", "-it", "-e", "OVER=flag", "-e", "PASSED", "-e", "GONE", "--env-file", "env", "-v", ".:/here:ro", "-v", "vol:/v", "-v", "/anon",
		"-p", "8080:80", "-p", "127.0.0.1:53:53/udp", "-p", "[::1]:9000-9001:9000-9001", "--entrypoint", "", "-h", "name", "-m", "64m", "--cpus", "1.5",
		"--mount", "type=bind,src=./sub,dst=/sub,readonly", "--tmpfs", "/t:size=1m", "--add-host", "h:1.2.3.4", "--network", "host", "--init", "-u", "1:2", "-w", "/w",
		"image", "cmd", "--rm", "-e", "not=ours")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"cmd", "--rm", "-e", "not=ours"}; !slices.Equal(c.Cmd, want) {
		t.Errorf("command %q, want %q", c.Cmd, want)
	}
	if want := []string{"FILE=1", "PASSED=on", "OVER=file", "OVER=flag", "PASSED=on", "GONE"}; !slices.Equal(c.Env, want) {
		t.Errorf("env %q, want %q", c.Env, want)
	}
	if want := []string{dir + ":/here:ro", "vol:/v"}; !slices.Equal(h.Binds, want) {
		t.Errorf("binds %q, want %q", h.Binds, want)
	}
	if _, ok := c.Volumes["/anon"]; !ok || h.Mounts[0].Source != filepath.Join(dir, "sub") || !h.Mounts[0].ReadOnly || h.Tmpfs["/t"] != "size=1m" {
		t.Errorf("volumes %v, mounts %+v, tmpfs %v", c.Volumes, h.Mounts, h.Tmpfs)
	}
	ports, err := json.Marshal(h.PortBindings)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(`{"53/udp":[{"HostIp":"127.0.0.1","HostPort":"53"}],"80/tcp":[{"HostIp":"","HostPort":"8080"}],`+
		`"9000/tcp":[{"HostIp":"::1","HostPort":"9000"}],"9001/tcp":[{"HostIp":"::1","HostPort":"9001"}]}`, string(ports)); d != "" {
		t.Error(d)
	}
	if len(c.ExposedPorts) != 4 || !c.Tty || !c.OpenStdin || !c.StdinOnce || !slices.Equal(c.Entrypoint, []string{""}) || c.Hostname != "name" || c.User != "1:2" || c.WorkingDir != "/w" ||
		!h.AutoRemove || h.Memory != 64<<20 || h.NanoCPUs != 1_500_000_000 || h.NetworkMode != "host" || !*h.Init || h.ExtraHosts[0] != "h:1.2.3.4" {
		t.Errorf("config %+v\nhost %+v", c, h)
	}
	if c, _, err := parseRun(t, "image"); err != nil || c.Entrypoint != nil || len(c.Cmd) > 0 || len(c.ExposedPorts) != 0 {
		t.Errorf("without flags: %+v, %v", c, err)
	}
	for _, bad := range [][]string{
		{"-v", "relative", "image"}, {"-p", "x:y", "image"}, {"-p", "99999:80", "image"}, {"-e", "=x", "image"}, {"--env-file", "nope", "image"}, {"--add-host", "x", "image"}, {"--label", "=x", "image"},
	} {
		if _, _, err := parseRun(t, bad...); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestAPIErrors(t *testing.T) {
	for in, want := range map[string]string{
		"Error response from daemon: No such image: x:latest": "no such image: x:latest (not in the local store; slipway pull x:latest fetches it)",
		"Error response from daemon: No such container: c":    "no such container: c (slipway ps -a lists them)",
		"Error response from daemon: something else":          "something else",
	} {
		cause := errors.New(in)
		if got := apiError(cause); got.Error() != want || !errors.Is(got, cause) {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
	if apiError(nil) != nil {
		t.Error("no error became one")
	}
}
