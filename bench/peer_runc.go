// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// runcPeer runs a container from a directory that is there already: no image, no store, no network.
type runcPeer struct {
	path, what string
}

func (r *runcPeer) name() string    { return "runc" }
func (r *runcPeer) version() string { return r.what }
func (r *runcPeer) help() *exec.Cmd { return exec.Command(r.path, "--help") }

func (r *runcPeer) find(ctx context.Context) bool {
	var err error
	if r.path, err = exec.LookPath("runc"); err != nil {
		return false
	}
	line, ok := firstLine(ctx, "runc", "--version")
	if _, err := fmt.Sscanf(line, "runc version %s", &r.what); err != nil {
		return false
	}
	return ok
}

// ready implements runner. The bundle is what "runc spec" writes, without a terminal.
func (r *runcPeer) ready(ctx context.Context, b *bench, dir string) (func() *exec.Cmd, func() []int, func() error, error) {
	fail := func(err error) (func() *exec.Cmd, func() []int, func() error, error) { return nil, nil, nil, err }
	bundle := filepath.Join(dir, "bundle")
	if err := os.MkdirAll(filepath.Join(bundle, "rootfs/bin"), 0o755); err != nil {
		return fail(err)
	}
	box, err := busybox()
	if err != nil {
		return fail(err)
	}
	if err := copyFile(box, filepath.Join(bundle, "rootfs/bin/busybox"), 0o755); err != nil {
		return fail(err)
	}
	spec := exec.CommandContext(ctx, r.path, "spec", "--bundle", bundle)
	if err := runQuietly(ctx, spec); err != nil {
		return fail(err)
	}
	file := filepath.Join(bundle, "config.json")
	raw, err := os.ReadFile(file)
	if err != nil {
		return fail(err)
	}
	var config map[string]any
	if err := json.Unmarshal(raw, &config); err != nil {
		return fail(err)
	}
	process, ok := config["process"].(map[string]any)
	if !ok {
		return fail(fmt.Errorf("%s has no process", file))
	}
	process["terminal"] = false
	process["args"] = []string{"/bin/busybox", "true"}
	if raw, err = json.Marshal(config); err != nil {
		return fail(err)
	}
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		return fail(err)
	}
	n := 0
	call := func() *exec.Cmd {
		n++
		return exec.Command(r.path, "--root", filepath.Join(dir, "state"), "run", "--bundle", bundle, fmt.Sprintf("slipway-bench-%d-%d", os.Getpid(), n))
	}
	return call, func() []int { return nil }, func() error { return nil }, nil
}
