// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"

	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

const epochArg = "build-arg:SOURCE_DATE_EPOCH"

// addEpoch completes SOURCE_DATE_EPOCH among the frontend's attributes: as other clients do it takes it from the environment, and
// "context", there or as the default of the Dockerfile's own ARG, is the time of the commit for a directory that is a clean git tree. Any
// other "context" is for the frontend to resolve, which can do so for git and http contexts.
func addEpoch(ctx context.Context, attrs map[string]string, dir string, warnings io.Writer) error {
	value, ok := attrs[epochArg]
	if !ok {
		if value = os.Getenv("SOURCE_DATE_EPOCH"); value != "" {
			attrs[epochArg] = value
		} else if value = dockerfileEpoch(attrs); value != "context" {
			return nil // the frontend sees it too
		}
	}
	if value != "context" || dir == "-" || attrs["context"] != "" {
		return nil
	}
	seconds, err := commitTime(ctx, dir)
	if err != nil {
		fmt.Fprintf(warnings, "warning: SOURCE_DATE_EPOCH=context has no effect: %v\n", err)
		return nil
	}
	attrs[epochArg] = strconv.FormatInt(seconds, 10)
	return nil
}

// dockerfileEpoch is the default of the Dockerfile's global ARG SOURCE_DATE_EPOCH; "" if it has none, or is not here. What is wrong with a
// Dockerfile the frontend says.
func dockerfileEpoch(attrs map[string]string) (value string) {
	dir, name := attrs[buildkitapi.LocalDirAttr+"dockerfile"], attrs["filename"]
	if dir == "" {
		return ""
	}
	if name == "" {
		name = "Dockerfile"
	}
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxDockerfile))
	if err != nil || !bytes.Contains(text, []byte("SOURCE_DATE_EPOCH")) {
		return ""
	}
	parsed, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return ""
	}
	_, global, err := instructions.Parse(parsed.AST, nil)
	if err != nil {
		return ""
	}
	for _, arg := range global {
		for _, one := range arg.Args {
			if one.Key == "SOURCE_DATE_EPOCH" && one.Value != nil {
				value = strings.Trim(*one.Value, `"'`)
			}
		}
	}
	return value
}

// commitTime is when the commit was made whose tree dir shows, in seconds since 1970.
func commitTime(ctx context.Context, dir string) (int64, error) {
	changed, err := git(ctx, dir, "status", "--porcelain", "--", ".")
	if err != nil {
		return 0, err
	}
	if changed != "" {
		first, _, _ := strings.Cut(changed, "\n")
		return 0, fmt.Errorf("%s is not a clean git tree (%s): commit what has changed, or give a number", dir, strings.TrimSpace(first))
	}
	out, err := git(ctx, dir, "log", "-1", "--format=%ct")
	if err != nil {
		return 0, err
	}
	seconds, err := strconv.ParseInt(out, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("git says that the commit of %s is of %q", dir, out)
	}
	return seconds, nil
}

// git runs git in a directory, without programs that its configuration may name and without writing to it.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir, "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"}, args...)...)
	cmd.Env = append(os.Environ(), "GIT_OPTIONAL_LOCKS=0", "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			if said, _, _ := strings.Cut(string(exit.Stderr), "\n"); said != "" {
				return "", fmt.Errorf("git: %s", strings.TrimPrefix(said, "fatal: "))
			}
		}
		return "", fmt.Errorf("git: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
