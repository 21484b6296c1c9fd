// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/upload/uploadprovider"
	"github.com/moby/buildkit/util/archiveutil"
)

// buildContext is what a build is made from. Clean it up.
type buildContext struct {
	// session offers what the engine fetches from us; nil for nothing.
	session session.Attachable
	temp    []string // directories to be removed
}

func (c *buildContext) cleanup() {
	for _, dir := range c.temp {
		_ = os.RemoveAll(dir)
	}
}

// tempDir is removed by cleanup.
func (c *buildContext) tempDir() (string, error) {
	dir, err := os.MkdirTemp("", "slipway-context-")
	if err == nil {
		c.temp = append(c.temp, dir)
	}
	return dir, err
}

// addContext adds the main context and the Dockerfile: a directory, the address of a git repository or an archive, or - for
// standard input, which has an archive or a Dockerfile.
func (a *app) addContext(solve *bkclient.SolveOpt, file, dir string) (c *buildContext, err error) {
	c = &buildContext{}
	defer func() {
		if err != nil {
			c.cleanup()
		}
	}()
	switch {
	case dir == "-":
		return c, a.addStdin(solve, c, file)
	case remoteContext(dir) && !exists(dir):
		return c, a.addRemote(solve, c, file, dir)
	}
	if err := checkDir(dir); err != nil {
		return c, fmt.Errorf("context %s: %w", dir, err)
	}
	if err := addLocal(solve, "context", dir); err != nil {
		return c, err
	}
	if file == "-" {
		return c, a.addStdinDockerfile(solve, c)
	}
	if file, err = findDockerfile(file, dir); err != nil {
		return c, err
	}
	solve.FrontendAttrs["filename"] = filepath.Base(file)
	return c, addLocal(solve, "dockerfile", filepath.Dir(file))
}

// findDockerfile is the Dockerfile of a directory, unless another file is named.
func findDockerfile(file, dir string) (string, error) {
	if file == "" {
		file = filepath.Join(dir, "Dockerfile")
		if _, err := os.Stat(file); err != nil {
			if lower := filepath.Join(dir, "dockerfile"); exists(lower) {
				file = lower
			} else if errors.Is(err, os.ErrNotExist) {
				return "", fmt.Errorf("no Dockerfile in %s (name another with -f)", dir)
			}
		}
	}
	info, err := os.Stat(file)
	if err != nil {
		return "", fmt.Errorf("file %s: %w", file, pathReason(err))
	}
	if info.IsDir() {
		return "", fmt.Errorf("file %s: is a directory, not a Dockerfile", file)
	}
	return file, nil
}

// addRemote adds a context that the engine fetches. Its Dockerfile is in it, unless -f - brings one.
func (a *app) addRemote(solve *bkclient.SolveOpt, c *buildContext, file, address string) error {
	solve.FrontendAttrs["context"] = address
	switch file {
	case "":
	case "-":
		solve.FrontendAttrs["dockerfilekey"] = "dockerfile"
		return a.addStdinDockerfile(solve, c)
	default:
		solve.FrontendAttrs["filename"] = file
	}
	return nil
}

// addStdin adds a context from standard input: an archive, which is sent as it is read, or a Dockerfile without a context.
func (a *app) addStdin(solve *bkclient.SolveOpt, c *buildContext, file string) error {
	if file == "-" {
		return errors.New("standard input cannot be the context and the Dockerfile (-f -) at once")
	}
	in := bufio.NewReaderSize(a.stdin(), 1024)
	head, err := in.Peek(1024)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the context from standard input: %w", err)
	}
	if archiveutil.IsArchive(head) {
		uploader := uploadprovider.New()
		solve.FrontendAttrs["context"] = uploader.Add(io.NopCloser(in))
		c.session = uploader
		if file != "" {
			solve.FrontendAttrs["filename"] = file
		}
		return nil
	}
	empty, err := c.tempDir()
	if err != nil {
		return err
	}
	if err := addLocal(solve, "context", empty); err != nil {
		return err
	}
	if file != "" {
		return fmt.Errorf("-f %s: standard input has a Dockerfile and no archive that the file could be in", file)
	}
	return addDockerfileFrom(in, solve, c)
}

func (a *app) addStdinDockerfile(solve *bkclient.SolveOpt, c *buildContext) error {
	return addDockerfileFrom(a.stdin(), solve, c)
}

// maxDockerfile bounds a Dockerfile from standard input, in bytes.
const maxDockerfile = 16 << 20

func addDockerfileFrom(in io.Reader, solve *bkclient.SolveOpt, c *buildContext) error {
	data, err := io.ReadAll(io.LimitReader(in, maxDockerfile+1))
	switch {
	case err != nil:
	case len(data) > maxDockerfile:
		err = fmt.Errorf("larger than %d bytes", maxDockerfile)
	case len(bytes.TrimSpace(data)) == 0:
		err = errors.New("nothing there")
	}
	if err != nil {
		return fmt.Errorf("read the Dockerfile from standard input: %w", err)
	}
	dir, err := c.tempDir()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), data, 0o600); err != nil {
		return err
	}
	return addLocal(solve, "dockerfile", dir)
}
