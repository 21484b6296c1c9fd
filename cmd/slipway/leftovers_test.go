// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// leftovers lists what the engine of root has left on this machine, after a moment for processes that are just dying.
func leftovers(tb testing.TB, root string) []string {
	tb.Helper()
	deadline := time.Now().Add(3 * time.Second)
	for {
		found := lookForLeftovers(tb, root)
		if len(found) == 0 || time.Now().After(deadline) {
			return found
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// shortHash is what executor/network and executor/runc put into the names of things on the host.
func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:4])
}

func lookForLeftovers(tb testing.TB, root string) []string {
	tb.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	var found []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], root+"/") {
			found = append(found, "mount "+f[4])
		}
	}
	found = append(found, processesOf(root)...)

	engine := wire.CgroupPrefix + shortHash(filepath.Join(root, "executor"))
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == engine {
			found = append(found, "cgroup "+path)
			return fs.SkipDir
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join("/run", engine)); err == nil {
		found = append(found, "directory "+filepath.Join("/run", engine))
	}

	id := shortHash(root)
	links, err := netlink.LinkList()
	for range 50 {
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
		links, err = netlink.LinkList() // other engines come and go
	}
	if err != nil {
		tb.Fatal(err)
	}
	for _, l := range links {
		if name := l.Attrs().Name; name == "slw"+id || strings.HasPrefix(name, "slv"+id[:6]+".") {
			found = append(found, "interface "+name)
		}
	}
	conn, err := nftables.New()
	if err != nil {
		tb.Fatal(err)
	}
	if tables, err := conn.ListTables(); err == nil {
		for _, t := range tables {
			if strings.HasSuffix(t.Name, id) {
				found = append(found, "table "+t.Name)
			}
		}
	}
	for _, pattern := range []string{"tmp/*", "executor/*.tmp"} {
		files, _ := filepath.Glob(filepath.Join(root, pattern))
		for _, f := range files {
			found = append(found, "file "+f)
		}
	}
	return found
}

// processesOf finds processes that were started for root or are in a container of its engine.
func processesOf(root string) []string {
	var found []string
	engine := wire.CgroupPrefix + shortHash(filepath.Join(root, "executor"))
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if dir == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue
		}
		exe, _ := os.Readlink(filepath.Join(dir, "exe"))
		cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		if bytes.Contains(cmdline, []byte(root+"\x00")) && bytes.HasPrefix(cmdline, []byte("slipway\x00")) ||
			strings.HasPrefix(exe, root+"/") || bytes.Contains(cgroup, []byte("/"+engine)) {
			found = append(found, fmt.Sprintf("process %d: %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte(" "))))
		}
	}
	return found
}
