// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// smallFilesProgram writes the files, for awk.
const smallFilesProgram = `BEGIN { s = sprintf("%02000d", 7); for (i = 0; i < 20000; i++) { f = "/out/" i; print s i >f; close(f) } }`

var smallFiles = &scenario{
	name: "small-files",
	about: "A step that writes 20,000 files of 2 kB, without the cache: what comes after the command, when all that it has written is looked at, shows here. " +
		"Nothing is exported. The goal is 5 % over the floor.",
	goals:      []goal{withinFloor(1.05)},
	floorAbout: "the same command on an overlay mount in a mount namespace of its own",
	prepare: func(_ context.Context, b *bench) error {
		return errors.Join(
			b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
				"busybox": "", "write.awk": smallFilesProgram,
				"Dockerfile": smallImage + "COPY write.awk /\nWORKDIR /out\nRUN [\"/bin/busybox\", \"awk\", \"-f\", \"/write.awk\"]\n",
			}),
			b.writeInput(filepath.Join(b.dir, "lower"), map[string]string{"bin/busybox": "", "write.awk": smallFilesProgram, "out/.keep": ""}),
		)
	},
	floor: func(ctx context.Context, b *bench) error {
		return b.onOverlay(ctx, `exec chroot "$root" /bin/busybox awk -f /write.awk`)
	},
	contestant: building(build{dir: "context", noCache: true}, 0),
}

// onOverlay runs a shell script in a mount namespace of its own in which $root is an overlay over the scenario's directory "lower",
// mounted without further options. What it writes is moved away before the next time.
func (b *bench) onOverlay(ctx context.Context, script string) error {
	dir := filepath.Join(b.dir, "floor")
	if err := b.moveAway(dir); err != nil {
		return err
	}
	for _, sub := range []string{"upper", "work", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", "-e", "-c",
		`mount --make-rprivate /; mount -t overlay overlay -o lowerdir="$dir/../lower",upperdir="$dir/upper",workdir="$dir/work" "$dir/root"; root=$dir/root; `+script)
	cmd.Env = append(os.Environ(), "dir="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	return runQuietly(ctx, cmd)
}
