// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// runnerEnv names a runner to use in place of the embedded one.
const runnerEnv = "SLIPWAY_RUNNER"

// ErrNoRunner is returned by Start when the program was built without its runner.
var ErrNoRunner = errors.New("built without slipway-runner: run make build")

//go:embed all:runner
var embedded embed.FS

// Embedded says whether this program carries its runner.
func Embedded() bool {
	_, err := fs.Stat(embedded, "runner/slipway-runner")
	return err == nil
}

// runnerPath returns the path of a runner that can be executed: the one that the environment names, or the embedded
// one, which is written below dir when it is not there yet.
func runnerPath(dir string) (string, error) {
	if path := os.Getenv(runnerEnv); path != "" {
		path, err := filepath.Abs(path)
		if err != nil {
			return "", err
		}
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("%s: %w", runnerEnv, err)
		}
		return path, nil
	}
	binary, err := embedded.ReadFile("runner/slipway-runner")
	if err != nil {
		return "", ErrNoRunner
	}
	sum := sha256.Sum256(binary)
	// A directory of its own: libcontainer mounts it to seal the executable.
	dir = filepath.Join(dir, "runner-"+hex.EncodeToString(sum[:8]))
	path := filepath.Join(dir, "slipway-runner")
	if st, err := os.Lstat(path); err == nil && st.Mode().IsRegular() && st.Size() == int64(len(binary)) {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("write runner: %w", err)
	}
	if err := writeExecutable(path, binary); err != nil {
		return "", fmt.Errorf("write runner: %w", err)
	}
	return path, nil
}

// writeExecutable writes a file that is either whole or not there, also after a crash.
func writeExecutable(path string, b []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o700), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
