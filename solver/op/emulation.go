// SPDX-License-Identifier: Apache-2.0

package op

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/executor"
)

// binfmtDir is where the kernel shows which interpreters it has been told of for foreign programs.
const binfmtDir = "/proc/sys/fs/binfmt_misc"

// machine is how programs of an architecture begin.
type machine struct {
	arch      string // as Go and OCI call it
	qemu      string // as QEMU calls it
	elf       uint16 // e_machine
	bits      byte   // ELFCLASS: 1 for 32, 2 for 64
	bigEndian bool
}

var machines = []machine{
	{"amd64", "x86_64", 62, 2, false},
	{"386", "i386", 3, 1, false},
	{"arm64", "aarch64", 183, 2, false},
	{"arm", "arm", 40, 1, false},
	{"riscv64", "riscv64", 243, 2, false},
	{"ppc64le", "ppc64le", 21, 2, false},
	{"s390x", "s390x", 22, 2, true},
	{"mips64le", "mips64el", 8, 2, false},
	{"mips64", "mips64", 8, 2, true},
	{"loong64", "loongarch64", 258, 2, false},
}

// header is the beginning of a program, as the kernel compares it with what handlers ask for.
func (m machine) header() []byte {
	h := make([]byte, 20)
	copy(h, "\x7fELF")
	h[4], h[5], h[6] = m.bits, 1, 1
	order := binary.ByteOrder(binary.LittleEndian)
	if m.bigEndian {
		h[5], order = 2, binary.BigEndian
	}
	order.PutUint16(h[16:], 2) // an executable
	order.PutUint16(h[18:], m.elf)
	return h
}

func findMachine(arch string) (machine, bool) {
	for _, m := range machines {
		if m.arch == arch {
			return m, true
		}
	}
	return machine{}, false
}

// handler is an interpreter for foreign programs.
type handler struct {
	name        string
	interpreter string
	// fixed says that the kernel holds the interpreter open (flag F), so that it need not be in the container.
	fixed bool
}

// findHandler returns the enabled handler in dir for programs of m.
func findHandler(dir string, m machine) (handler, bool) {
	if status, err := os.ReadFile(filepath.Join(dir, "status")); err != nil || strings.TrimSpace(string(status)) != "enabled" {
		return handler{}, false
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return handler{}, false
	}
	for _, e := range entries {
		if e.Name() == "register" || e.Name() == "status" {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		if h, ok := parseHandler(string(data), m.header()); ok {
			h.name = e.Name()
			return h, true
		}
	}
	return handler{}, false
}

// parseHandler reads one file of binfmt_misc and says whether it is for programs that begin with header.
func parseHandler(text string, header []byte) (h handler, ok bool) {
	enabled := false
	var magic, mask []byte
	offset := 0
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch key {
		case "enabled":
			enabled = true
		case "interpreter":
			h.interpreter = value
		case "flags:":
			h.fixed = strings.Contains(value, "F")
		case "offset":
			offset, _ = strconv.Atoi(value)
		case "magic":
			magic, _ = hex.DecodeString(value)
		case "mask":
			mask, _ = hex.DecodeString(value)
		}
	}
	if !enabled || len(magic) == 0 || offset < 0 || offset+len(magic) > len(header) {
		return handler{}, false
	}
	for i, want := range magic {
		different := header[offset+i] ^ want
		if i < len(mask) {
			different &= mask[i]
		}
		if different != 0 {
			return handler{}, false
		}
	}
	return h, true
}

// EmulatedPlatforms are those for which this host has a handler that works in containers.
func EmulatedPlatforms() []ocispec.Platform {
	var out []ocispec.Platform
	for _, m := range machines {
		if m.arch == runtime.GOARCH {
			continue
		}
		if h, ok := findHandler(binfmtDir, m); ok && h.fixed {
			p := ocispec.Platform{OS: "linux", Architecture: m.arch}
			if m.arch == "arm" {
				p.Variant = "v7"
			}
			out = append(out, p)
		}
	}
	return out
}

// canRun refuses a process for an architecture that neither this machine nor a handler of its kernel can run. exists
// says whether the root of the process has a file.
func canRun(dir string, p *pb.Platform, exists func(name string) (bool, error)) error {
	arch := p.GetArchitecture()
	if arch == "" || arch == runtime.GOARCH {
		return nil
	}
	platform := "linux/" + arch
	if p.Variant != "" {
		platform += "/" + p.Variant
	}
	what := fmt.Sprintf("cannot run a process for %s on this linux/%s machine", platform, runtime.GOARCH)
	m, known := findMachine(arch)
	if !known {
		return fmt.Errorf("%s: the architecture is not known", what)
	}
	h, ok := findHandler(dir, m)
	if !ok {
		if arch == "386" && runtime.GOARCH == "amd64" || arch == "arm" && runtime.GOARCH == "arm64" {
			what += ", whose steps may only make 64-bit system calls"
		}
		return fmt.Errorf("%s: %s, or run the step on the build platform (FROM --platform=$BUILDPLATFORM)", what, m.noHandler(dir))
	}
	if h.fixed {
		return nil
	}
	found, err := exists(h.interpreter)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("%s: the binfmt_misc handler %s runs %s, which the image does not have: register the handler with the flag F", what, h.name, h.interpreter)
	}
	return nil
}

// noHandler says that there is no handler for programs of m, and what to install.
func (m machine) noHandler(dir string) string {
	return fmt.Sprintf("the kernel has no binfmt_misc handler for it (qemu-%s is not registered in %s): install the host's qemu-user-static package, "+
		"or register a handler that is fixed (flag F)", m.qemu, dir)
}

// NoEmulation says why programs of an architecture cannot run in containers here and what to install; "" when they can.
func NoEmulation(arch string) string {
	m, ok := findMachine(arch)
	if !ok || arch == runtime.GOARCH {
		return ""
	}
	if h, ok := findHandler(binfmtDir, m); ok && h.fixed {
		return ""
	}
	return m.noHandler(binfmtDir)
}

// machineOf is the machine that a program is for, by its beginning.
func machineOf(header []byte) (machine, bool) {
	if len(header) < 20 || string(header[:4]) != "\x7fELF" {
		return machine{}, false
	}
	for _, m := range machines {
		want := m.header()
		if header[4] == want[4] && header[5] == want[5] && string(header[18:20]) == string(want[18:20]) {
			return m, true
		}
	}
	return machine{}, false
}

// foreignProgram says so when a command could not be executed because it is for another architecture, which its image did not tell: the
// kernel's own words are "exec format error", and those of a shell are about what it read as a script. It looks at the files as they were
// before the step, and at the first word of a shell's command.
func (s *step) foreignProgram(ctx context.Context, spec executor.Spec) error {
	view, err := s.op.deps.Snapshots.View(ctx, s.input(s.op.op.Mounts[s.op.root]))
	if err != nil {
		return nil
	}
	root, err := os.OpenRoot(spec.Rootfs)
	if err != nil {
		return nil
	}
	defer root.Close()
	candidates := spec.Args[:1]
	if n := len(spec.Args); n >= 3 && spec.Args[n-2] == "-c" {
		if words := strings.Fields(spec.Args[n-1]); len(words) > 0 {
			candidates = append(slices.Clone(candidates), words[0])
		}
	}
	for _, name := range candidates {
		for _, dir := range searchPath(name, spec) {
			p, err := index.Resolve(view, path.Join(dir, name), true)
			if err != nil {
				continue
			}
			if m, ok := machineOf(beginning(root, p)); ok {
				h, found := findHandler(s.op.deps.binfmtDir(), m)
				if m.arch != runtime.GOARCH && (!found || !h.fixed) {
					return fmt.Errorf("%s is a program for linux/%s, and this machine is linux/%s: %s", path.Join(dir, name), m.arch, runtime.GOARCH, m.noHandler(s.op.deps.binfmtDir()))
				}
				break
			}
		}
	}
	return nil
}

// searchPath is where a command is looked for: in PATH, unless it has a slash in it.
func searchPath(name string, spec executor.Spec) []string {
	switch {
	case strings.HasPrefix(name, "/"):
		return []string{"/"}
	case strings.Contains(name, "/"):
		return []string{spec.Cwd}
	}
	for _, e := range slices.Backward(spec.Env) {
		if list, ok := strings.CutPrefix(e, "PATH="); ok {
			return slices.DeleteFunc(strings.Split(list, ":"), func(dir string) bool { return !path.IsAbs(dir) })
		}
	}
	return nil
}

// beginning is the header of a regular file below root, nothing when there is none.
func beginning(root *os.Root, name string) []byte {
	f, err := root.OpenFile(strings.TrimPrefix(path.Clean(name), "/"), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	header := make([]byte, 20)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil
	}
	n, _ := io.ReadFull(f, header)
	return header[:n]
}

// checkPlatform is canRun for the step.
func (s *step) checkPlatform(ctx context.Context) error {
	return canRun(s.op.deps.binfmtDir(), s.op.platform, func(name string) (bool, error) {
		view, err := s.op.deps.Snapshots.View(ctx, s.input(s.op.op.Mounts[s.op.root]))
		if err != nil {
			return false, err
		}
		p, err := index.Resolve(view, name, true)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		_, ok := view.Lookup(p)
		return ok, nil
	})
}

func (d *Deps) binfmtDir() string {
	if d.BinfmtDir != "" {
		return d.BinfmtDir
	}
	return binfmtDir
}
