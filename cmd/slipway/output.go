// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	bkclient "github.com/moby/buildkit/client"

	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// outputs are what a build makes, by -o, --push and --load.
type outputs struct {
	exports []bkclient.ExportEntry
	files   []*outputFile
	// toStdout says that one of them goes to standard output, where nothing else may be printed then.
	toStdout bool
}

// outputs reads the flags.
func (o *buildOptions) readOutputs(stdout io.Writer) (*outputs, error) {
	out := &outputs{}
	var specs []map[string]string
	none := false // type=cacheonly
	for _, text := range o.outputs {
		attrs, err := parseOutput(text)
		if err != nil {
			return nil, err
		}
		if attrs["type"] == "cacheonly" {
			none = true
			if len(attrs) > 1 {
				return nil, fmt.Errorf("--output %s: type=cacheonly has no attributes", text)
			}
			continue
		}
		specs = append(specs, attrs)
	}
	isImage := func(attrs map[string]string) bool { return attrs["type"] == "image" }
	if o.push {
		if i := slices.IndexFunc(specs, isImage); i >= 0 {
			specs[i]["push"] = "true"
		} else {
			specs = append(specs, map[string]string{"type": "image", "push": "true"})
		}
	}
	if o.load && !slices.ContainsFunc(specs, isImage) {
		specs = append(specs, map[string]string{"type": "image"})
	}
	if len(specs) == 0 && !none {
		specs = append(specs, map[string]string{"type": "image"})
	}
	named := false
	for _, attrs := range specs {
		isNamed, err := o.nameOutput(attrs)
		if err != nil {
			return nil, err
		}
		named = named || isNamed
		if err := out.add(attrs, stdout); err != nil {
			return nil, err
		}
	}
	if len(o.tags) > 0 && !named {
		return nil, errors.New("none of the outputs is an image that -t could name")
	}
	return out, nil
}

// parseOutput reads one -o: DIR, - for a tar on standard output, or type=TYPE,KEY=VALUE…
func parseOutput(text string) (map[string]string, error) {
	if !strings.ContainsAny(text, "=,") {
		switch text {
		case "":
			return nil, errors.New("--output: empty; want DIR, - or type=TYPE,KEY=VALUE…")
		case "-":
			return map[string]string{"type": "tar", "dest": "-"}, nil
		}
		return map[string]string{"type": "local", "dest": text}, nil
	}
	attrs, err := parseCSV(text, "--output")
	if err != nil {
		return nil, err
	}
	switch attrs["type"] {
	case "":
		return nil, fmt.Errorf("--output %s: has no type", text)
	case "registry":
		attrs["type"] = "image"
		if _, ok := attrs["push"]; !ok {
			attrs["push"] = "true"
		}
	case "docker":
		if attrs["dest"] == "" { // as docker has it: into the store that images are run from
			delete(attrs, "dest")
			attrs["type"] = "image"
		}
	}
	return attrs, nil
}

// nameOutput gives an image its names: those of -t and its own.
func (o *buildOptions) nameOutput(attrs map[string]string) (named bool, err error) {
	switch attrs["type"] {
	case "image", "oci", "docker":
	default:
		return false, nil
	}
	names := slices.Clone(o.tags)
	if name := attrs["name"]; name != "" {
		names = append(names, strings.Split(name, ",")...)
	}
	for i, name := range names {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return false, fmt.Errorf("image name %q: %w", name, err)
		}
		if _, ok := named.(reference.Digested); ok {
			return false, fmt.Errorf("image name %q: has a digest; the digest of what is built is not known before", name)
		}
		if byDigest, _ := strconv.ParseBool(attrs["push-by-digest"]); byDigest {
			names[i] = named.String()
			continue
		}
		names[i] = reference.TagNameOnly(named).String()
	}
	if len(names) > 0 {
		attrs["name"] = strings.Join(names, ",")
	}
	if push, _ := strconv.ParseBool(attrs["push"]); push && len(names) == 0 {
		return false, errors.New("a push needs a name: -t NAME")
	}
	return true, nil
}

// add makes one export of attrs.
func (out *outputs) add(attrs map[string]string, stdout io.Writer) error {
	entry := bkclient.ExportEntry{Type: attrs["type"], Attrs: attrs}
	dest, hasDest := attrs["dest"]
	delete(attrs, "type")
	delete(attrs, "dest")
	toDir := entry.Type == bkclient.ExporterLocal
	switch entry.Type {
	case bkclient.ExporterLocal:
	case bkclient.ExporterTar:
	case bkclient.ExporterOCI, bkclient.ExporterDocker:
		if value, ok := attrs["tar"]; ok {
			tar, err := strconv.ParseBool(value)
			if err != nil {
				return fmt.Errorf("--output type=%s: tar=%s is not true or false", entry.Type, value)
			}
			toDir = !tar
		}
	default:
		if hasDest {
			return fmt.Errorf("--output type=%s: has no dest", entry.Type)
		}
		out.exports = append(out.exports, entry)
		return nil
	}
	switch {
	case toDir && dest == "-":
		return fmt.Errorf("--output type=%s: a directory cannot go to standard output", entry.Type)
	case toDir && dest == "":
		return fmt.Errorf("--output type=%s: want dest=DIR", entry.Type)
	case toDir:
		if info, err := os.Stat(dest); err == nil && !info.IsDir() {
			return fmt.Errorf("--output type=%s: dest %s is not a directory", entry.Type, dest)
		}
		entry.OutputDir = dest
	case dest == "" || dest == "-":
		if out.toStdout {
			return errors.New("--output: two outputs cannot both go to standard output")
		}
		if _, ok := terminal(stdout); ok {
			return fmt.Errorf("--output type=%s: standard output is a terminal: name a file with dest=FILE, or redirect it", entry.Type)
		}
		out.toStdout = true
		entry.Output = func(map[string]string) (io.WriteCloser, error) { return nopCloser{stdout}, nil }
	default:
		file, err := newOutputFile(dest)
		if err != nil {
			return fmt.Errorf("--output type=%s: dest %s: %w", entry.Type, dest, pathReason(err))
		}
		if slices.ContainsFunc(out.files, func(f *outputFile) bool { return f.path == file.path }) {
			return fmt.Errorf("--output: two outputs cannot both be %s", dest)
		}
		file.number = len(out.exports)
		out.files = append(out.files, file)
		entry.Output = file.open
	}
	out.exports = append(out.exports, entry)
	return nil
}

// checkMirrors refuses to delete what the build is made of.
func (out *outputs) checkMirrors(sources ...string) error {
	for _, e := range out.exports {
		if e.Type != bkclient.ExporterLocal || !strings.EqualFold(strings.TrimSpace(e.Attrs["mode"]), "delete") {
			continue
		}
		dest, err := realPath(e.OutputDir)
		if err != nil {
			return err
		}
		for _, source := range sources {
			real, err := realPath(source)
			if err != nil {
				return err
			}
			if rel, err := filepath.Rel(dest, real); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
				return fmt.Errorf("--output type=local,mode=delete: would delete %s, which is in %s", source, e.OutputDir)
			}
		}
	}
	return nil
}

// realPath is the absolute path without symlinks of a file that need not exist yet.
func realPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	real, err := filepath.EvalSymlinks(abs)
	if errors.Is(err, fs.ErrNotExist) {
		return abs, nil
	}
	return real, err
}

// handOver lets an engine of this host write the files itself, instead of sending what belongs in them.
func (out *outputs) handOver(attrs map[string]string) error {
	host, err := buildkitapi.HostID()
	if err != nil {
		return nil // through the session, then
	}
	for _, f := range out.files {
		if f.direct {
			continue
		}
		if err := f.create(); err != nil {
			return fmt.Errorf("--output: %w", err)
		}
		attrs[buildkitapi.HostAttr] = host
		attrs[buildkitapi.OutputFileAttr+strconv.Itoa(f.number)] = f.temp
	}
	return nil
}

// commit gives the files their names: the build has ended well.
func (out *outputs) commit() error {
	for _, f := range out.files {
		if err := f.commit(); err != nil {
			return err
		}
	}
	return nil
}

// discard removes what was not committed.
func (out *outputs) discard() {
	for _, f := range out.files {
		f.discard()
	}
}

// outputFile is a file that gets its name when everything is in it, so that what has the name is whole.
type outputFile struct {
	path string
	mode os.FileMode
	// existed says that mode is that of the file which is replaced.
	existed bool
	// direct says that there is something else than a file, like a pipe, which is written as it is.
	direct bool
	temp   string // "" as long as there is none
	number int    // of the output
}

func newOutputFile(dest string) (*outputFile, error) {
	path, err := realPath(dest)
	if err != nil {
		return nil, err
	}
	f := &outputFile{path: path, mode: 0o666}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return f, nil
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, errors.New("is a directory")
	}
	f.direct = !info.Mode().IsRegular()
	f.mode, f.existed = info.Mode().Perm(), true
	return f, nil
}

func (f *outputFile) open(map[string]string) (io.WriteCloser, error) {
	if f.direct {
		return os.OpenFile(f.path, os.O_WRONLY, 0)
	}
	if err := f.create(); err != nil {
		return nil, err
	}
	return os.OpenFile(f.temp, os.O_WRONLY|os.O_TRUNC, 0)
}

// create makes the file that gets the name later, unless it is there.
func (f *outputFile) create() error {
	if f.temp != "" {
		return nil
	}
	dir, name := filepath.Split(f.path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	temp := filepath.Join(dir, fmt.Sprintf(".%s.%d.slipway", name, os.Getpid()))
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.mode|0o600)
	if err != nil {
		return err
	}
	f.temp = temp
	return file.Close()
}

func (f *outputFile) commit() error {
	if f.temp == "" {
		return nil
	}
	info, err := os.Stat(f.temp)
	if err != nil {
		return err
	}
	if info.Size() == 0 { // nobody has written to it: no archive is empty
		f.discard()
		return nil
	}
	if f.existed {
		if err := os.Chmod(f.temp, f.mode); err != nil {
			return err
		}
	}
	err = os.Rename(f.temp, f.path)
	if err == nil {
		f.temp = ""
	}
	return err
}

func (f *outputFile) discard() {
	if f.temp != "" {
		_ = os.Remove(f.temp)
		f.temp = ""
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
