// SPDX-License-Identifier: Apache-2.0

//go:build linux && cgo && seccomp

package main

import libseccomp "github.com/seccomp/libseccomp-golang"

// syscallNumber returns this architecture's number of a syscall; ok is false when it has none.
func syscallNumber(name string) (nr uint32, ok bool, err error) {
	n, err := libseccomp.GetSyscallFromName(name)
	if err != nil || n < 0 {
		return 0, false, nil // an unknown name, or one of another architecture
	}
	return uint32(n), true, nil
}
