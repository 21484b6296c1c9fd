// SPDX-License-Identifier: Apache-2.0

//go:build linux && !(cgo && seccomp)

package main

import "errors"

func syscallNumber(string) (nr uint32, ok bool, err error) {
	return 0, false, errors.New("built without libseccomp")
}
