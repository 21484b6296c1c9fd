// SPDX-License-Identifier: Apache-2.0

package op

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
)

// qemuHandlers is what qemu-user's registration looks like in the kernel.
var qemuHandlers = map[string]string{
	"status": "enabled\n",
	"qemu-aarch64": "enabled\ninterpreter /usr/bin/qemu-aarch64\nflags: POCF\noffset 0\n" +
		"magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n",
	"qemu-s390x": "enabled\ninterpreter /usr/bin/qemu-s390x\nflags: OC\noffset 0\n" +
		"magic 7f454c4602020100000000000000000000020016\nmask ffffffffffffff00fffffffffffffffffffeffff\n",
	"qemu-riscv64": "disabled\ninterpreter /usr/bin/qemu-riscv64\nflags: F\noffset 0\n" +
		"magic 7f454c460201010000000000000000000200f300\nmask ffffffffffffff00fffffffffffffffffeffffff\n",
	"python": "enabled\ninterpreter /usr/bin/python3\nflags: \nextension .pyc\n",
}

func TestCanRun(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("written for amd64")
	}
	dir := t.TempDir()
	for name, text := range qemuHandlers {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		dir     string
		p       *pb.Platform
		inImage string
		want    string // in the error; "" for none
	}{
		{dir: t.TempDir(), p: nil},
		{dir: t.TempDir(), p: &pb.Platform{OS: "linux", Architecture: "amd64", Variant: "v3"}},
		{dir: t.TempDir(), p: &pb.Platform{OS: "linux", Architecture: "arm64"}, want: "qemu-aarch64 is not registered"},
		{dir: filepath.Join(dir, "nothing"), p: &pb.Platform{OS: "linux", Architecture: "arm64"}, want: "qemu-aarch64 is not registered"},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "arm64"}},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, want: "process for linux/arm/v7 on this linux/amd64 machine: the kernel has no binfmt_misc handler for it (qemu-arm is"},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "386"}, want: "process for linux/386 on this linux/amd64 machine, whose steps may only make 64-bit system calls: the kernel has no binfmt_misc handler for it (qemu-i386 is"},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "riscv64"}, want: "qemu-riscv64 is not registered"},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "s390x"}, want: "which the image does not have"},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "s390x"}, inImage: "/usr/bin/qemu-s390x"},
		{dir: dir, p: &pb.Platform{OS: "linux", Architecture: "pdp11"}, want: "the architecture is not known"},
	} {
		err := canRun(tc.dir, tc.p, func(name string) (bool, error) { return name == tc.inImage, nil })
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v: %v, want %q", tc.p, err, tc.want)
		}
	}
}
