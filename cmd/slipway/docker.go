// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"text/tabwriter"
	"text/template"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client/pkg/jsonmessage"
	"golang.org/x/term"
)

// What the commands on images and containers share: they are clients of the Docker Engine API.

// apiError is err in our words: without the client library's prefix, and with what to do about it.
func apiError(err error) error {
	if err == nil {
		return nil
	}
	text := strings.TrimPrefix(err.Error(), "Error response from daemon: ")
	if name, ok := strings.CutPrefix(text, "No such image: "); ok {
		return &clientError{fmt.Sprintf("no such image: %s (not in the local store; slipway pull %s fetches it)", name, name), err}
	}
	if name, ok := strings.CutPrefix(text, "No such container: "); ok {
		return &clientError{fmt.Sprintf("no such container: %s (slipway ps -a lists them)", name), err}
	}
	if strings.HasPrefix(text, "An image does not exist locally with the tag: ") {
		name := strings.TrimPrefix(text, "An image does not exist locally with the tag: ")
		return &clientError{fmt.Sprintf("no such image: %s (not in the local store under this tag; slipway tag gives an image a name)", name), err}
	}
	return &clientError{text, err}
}

// clientError is an error of the API with another text.
type clientError struct {
	text string
	err  error
}

func (e *clientError) Error() string { return e.text }
func (e *clientError) Unwrap() error { return e.err }

// eachArg calls f for each argument. Errors do not keep the others from their turn; all are reported, one a line, the last one
// by the caller.
func (a *app) eachArg(args []string, f func(string) error) error {
	var last error
	for _, arg := range args {
		err := f(arg)
		if err == nil {
			continue
		}
		if last != nil {
			fmt.Fprintf(a.err, "slipway: %s\n", message(last))
		}
		last = err
	}
	return last
}

// table writes aligned columns.
func (a *app) table(header string, rows func(row func(cells ...string))) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, header)
	rows(func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) })
	return w.Flush()
}

// printJSON prints v in one line.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// templateFuncs are docker's functions for templates.
var templateFuncs = template.FuncMap{
	"json": func(v any) (string, error) {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		err := enc.Encode(v)
		return strings.TrimSuffix(b.String(), "\n"), err
	},
	"join": func(list any, sep string) (string, error) {
		v := reflect.ValueOf(list)
		if v.Kind() != reflect.Slice {
			return "", fmt.Errorf("join of %T, which is no list", list)
		}
		var out []string
		for i := range v.Len() {
			out = append(out, fmt.Sprint(v.Index(i).Interface()))
		}
		return strings.Join(out, sep), nil
	},
	"lower": strings.ToLower, "upper": strings.ToUpper, "split": strings.Split, "println": fmt.Sprintln,
}

// shortID is the form of an ID that tables show.
func shortID(id string) string {
	_, hex, ok := strings.Cut(id, ":")
	if !ok {
		hex = id
	}
	return hex[:min(12, len(hex))]
}

// terminal returns the file descriptor of a stream that is a terminal.
func terminal(stream any) (int, bool) {
	f, ok := stream.(*os.File)
	if !ok {
		return 0, false
	}
	fd := int(f.Fd())
	return fd, term.IsTerminal(fd)
}

// showProgress prints a stream of docker's progress messages.
func showProgress(out io.Writer, messages func(yield func(jsonstream.Message, error) bool), aux func(jsonstream.Message)) error {
	fd, tty := terminal(out)
	err := jsonmessage.DisplayJSONMessages(messages, out, uintptr(fd), tty, aux)
	var remote *jsonstream.Error
	if errors.As(err, &remote) {
		return apiError(remote)
	}
	return apiError(err)
}

// hubKey is what docker's config.json calls Docker Hub.
const hubKey = "https://index.docker.io/v1/"

// registryKey is the name under which config.json has the credentials for a registry host.
func registryKey(host string) string {
	switch host {
	case "", "docker.io", "index.docker.io", "registry-1.docker.io":
		return hubKey
	}
	return host
}

// dockerConfig reads docker's config.json.
func dockerConfig() (*configfile.ConfigFile, error) {
	cfg, err := config.Load(config.Dir())
	if err != nil {
		return nil, fmt.Errorf("docker's configuration: %w", err)
	}
	return cfg, nil
}

// registryAuth is the X-Registry-Auth header for the registry of ref, "" when nobody has logged in there.
func registryAuth(ref string) (string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w", ref, err)
	}
	cfg, err := dockerConfig()
	if err != nil {
		return "", err
	}
	host := reference.Domain(named)
	auth, err := cfg.GetAuthConfig(registryKey(host))
	if err != nil {
		return "", fmt.Errorf("credentials for %s (see %s): %w", host, cfg.Filename, err)
	}
	header := registry.AuthConfig{
		Username: auth.Username, Password: auth.Password, ServerAddress: auth.ServerAddress,
		IdentityToken: auth.IdentityToken, RegistryToken: auth.RegistryToken,
	}
	if header.Username == "" && header.Password == "" && header.IdentityToken == "" && header.RegistryToken == "" {
		return "", nil
	}
	return authconfig.Encode(header)
}

// isNotFound tells that the engine does not have what was asked for.
func isNotFound(err error) bool { return errdefs.IsNotFound(err) }

// interrupted returns why ctx ended in place of the errors that this caused.
func interrupted(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
