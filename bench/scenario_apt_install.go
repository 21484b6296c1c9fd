// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// What is installed, and what it needs: about 110 MB when it is unpacked. The packages are fetched before, for the base as it is, so
// that neither the network nor a mirror is part of what is measured.
const (
	aptPackages = "git perl"
	aptBase     = ".tmp/bases/debian/rootfs.tar"
	aptCommand  = "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends /debs/*.deb >/dev/null"
)

var aptInstall = &scenario{
	name: "apt-install",
	about: "RUN apt-get install of git and perl (110 MB unpacked), whose packages lie in the base image (Debian), without the cache. Slipway mounts a step's overlay as volatile, so that " +
		"dpkg's many fsyncs cost nothing; what the floor is slower by is what that gains. The goal is BuildKit's time.",
	floorAbout: "the same command, changed to its root, on an overlay mount without further options",
	goal:       1,
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareApt(ctx) },
	floor: func(ctx context.Context, b *bench) error {
		return b.onOverlay(ctx, `mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"; exec chroot "$root" /bin/sh -c '`+aptCommand+`'`)
	},
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		if _, ok := p.(archiver); !ok { // its base is an OCI layout
			return nil, nil
		}
		one := build{dir: filepath.Join(b.dir, "context"), base: filepath.Join(b.dir, "layout"), noCache: true}
		return building(one, 0)(ctx, b, p)
	},
}

// prepareApt makes the base, as a directory for the floor and as an OCI layout: Debian as testdata/bases/bases.sh makes it, and packages.
func (b *bench) prepareApt(ctx context.Context) error {
	rootfs, err := filepath.Abs(aptBase)
	if err != nil {
		return err
	}
	if _, err := os.Stat(rootfs); err != nil {
		return &cannotError{"its base image is made of " + aptBase + ", which is not here: testdata/bases/bases.sh ROOT .tmp/bases debian makes it"}
	}
	lower, debs := filepath.Join(b.dir, "lower"), filepath.Join(b.dir, "base", "debs")
	if err := errors.Join(os.MkdirAll(lower, 0o755), os.MkdirAll(filepath.Join(debs, "partial"), 0o755)); err != nil {
		return err
	}
	if err := runQuietly(ctx, exec.CommandContext(ctx, "tar", "-x", "-f", rootfs, "-C", lower)); err != nil {
		return err
	}
	// This machine's apt, with its lists, decides by what is installed there.
	fetch := exec.CommandContext(ctx, "apt-get", append([]string{
		"install", "-y", "-qq", "--no-install-recommends", "--download-only", "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=true",
		"-o", "Dir::State::status=" + filepath.Join(lower, "var/lib/dpkg/status"), "-o", "Dir::Cache::archives=" + debs, "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=",
	}, strings.Fields(aptPackages)...)...)
	if err := runQuietly(ctx, fetch); err != nil {
		return &cannotError{fmt.Sprintf("the packages cannot be fetched (does this machine run the same Debian, and was apt-get update run?): %v", err)}
	}
	if err := errors.Join(os.Remove(filepath.Join(debs, "partial")), os.RemoveAll(filepath.Join(debs, "lock"))); err != nil {
		return err
	}
	if err := runQuietly(ctx, exec.CommandContext(ctx, "cp", "-a", debs, lower)); err != nil {
		return err
	}
	base := filepath.Join(b.dir, "base")
	if err := copyFile(rootfs, filepath.Join(base, "rootfs.tar"), 0o644); err != nil {
		return err
	}
	err = errors.Join(
		b.writeInput(base, map[string]string{"Dockerfile": "FROM scratch\nADD rootfs.tar /\nCOPY debs /debs\nENV PATH=/usr/sbin:/usr/bin:/sbin:/bin\n"}),
		b.writeInput(filepath.Join(b.dir, "context"), map[string]string{"Dockerfile": "FROM base\nRUN " + aptCommand + "\n"}),
	)
	if err != nil {
		return err
	}
	s := b.peers[0].(*slipway)
	o, err := s.open(ctx, b.stateDir("base"), 0)
	if err != nil {
		return err
	}
	err = runQuietly(ctx, o.build(build{dir: base, output: "type=oci,tar=false,compression=zstd,name=base,dest=" + filepath.Join(b.dir, "layout")}))
	return errors.Join(err, o.close())
}
