// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	bkclient "github.com/moby/buildkit/client"
	buildctl "github.com/moby/buildkit/cmd/buildctl/build"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"
)

// conformanceStart tells times that a build has set from those that files had before.
var conformanceStart = time.Now().Add(-time.Second)

// observation is what one engine made of a request, as lines that are the same for the other one. Numbers and digests that may
// differ (sizes of compressed blobs, times of this moment) are left out.
type observation struct {
	lines   []string
	failure error
	own     *strings.Replacer // of names that are only this engine's
}

func (o *observation) addf(format string, args ...any) {
	line := o.own.Replace(fmt.Sprintf(format, args...))
	again := line
	for n := 2; slices.Contains(o.lines, again); n++ {
		again = fmt.Sprintf("%s (%d)", line, n)
	}
	o.lines = append(o.lines, again)
}

// observe sends the request and looks at all that comes of it. Its own error is that the case itself is wrong.
func (b *conformanceCase) observe(ctx context.Context, client *bkclient.Client, r conformanceRequest, who string) (*observation, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := os.MkdirTemp(b.work, who+"-")
	if err != nil {
		return nil, err
	}
	r.words = slices.Clone(r.words)
	for i, w := range r.words {
		w = strings.ReplaceAll(w, "$REGISTRY", b.registries[who])
		r.words[i] = strings.ReplaceAll(w, "$OWN", filepath.Join(b.work, who))
	}
	solve, exports, err := b.request(r, out)
	if err != nil {
		return nil, err
	}
	o := &observation{own: strings.NewReplacer(b.registries[who], "REGISTRY", filepath.Join(b.work, who)+"/", "OWN/")}
	status := make(chan *bkclient.SolveStatus)
	var group errgroup.Group
	group.Go(func() error {
		o.addStatus(status, r.logs)
		return nil
	})
	var response *bkclient.SolveResponse
	if r.verb == "call" {
		maps.Copy(solve.FrontendAttrs, map[string]string{"requestid": r.what, "frontend.caps": "moby.buildkit.frontend.subrequests"})
		attrs := solve.FrontendAttrs
		var answer map[string][]byte
		response, err = client.Build(ctx, solve, "", func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
			res, err := c.Solve(ctx, gateway.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: attrs})
			if err == nil {
				answer = res.Metadata
			}
			return res, err
		}, status)
		defer func() {
			for _, key := range slices.Sorted(maps.Keys(answer)) {
				o.addAnswer("answer "+key, answer[key])
			}
		}()
	} else {
		response, err = client.Solve(ctx, nil, solve, status)
	}
	_ = group.Wait()
	if err != nil {
		o.failure = err
		// How far it came is not compared.
		o.lines = slices.DeleteFunc(o.lines, func(line string) bool { return !strings.HasPrefix(line, "warning ") })
		for _, s := range errdefs.Sources(err) {
			o.addf("error at %s: %s", s.Info.Filename, fmt.Sprint(s.Ranges))
		}
		return o, nil
	}
	for _, key := range slices.Sorted(maps.Keys(response.ExporterResponse)) {
		o.addf("response %s", masked(key+": "+readable(response.ExporterResponse[key])))
	}
	for i, e := range exports {
		prefix := ""
		if len(exports) > 1 {
			prefix = fmt.Sprintf("output %d ", i)
		}
		if e.pushed != "" {
			files, err := readRegistry(ctx, b.registries[who], e.pushed)
			if err == nil {
				err = o.addImages(prefix, files, b.baseLayers())
			}
			if err != nil {
				return nil, fmt.Errorf("look at what %s has pushed: %w", who, err)
			}
		} else if err := o.addOutput(prefix, e, b.baseLayers()); err != nil {
			return nil, fmt.Errorf("look at output %d of %s: %w", i, who, err)
		}
	}
	return o, nil
}

// conformanceOutput is where an output is.
type conformanceOutput struct {
	kind, path string
	pushed     string // name in the registry
}

// request makes what the client sends, from the words of a line.
func (b *conformanceCase) request(r conformanceRequest, out string) (solve bkclient.SolveOpt, exports []conformanceOutput, err error) {
	solve = bkclient.SolveOpt{Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{}}
	dir := b.context
	flags := map[string][]string{}
	for i := 0; i < len(r.words); i++ {
		word := r.words[i]
		if !strings.HasPrefix(word, "-") {
			name, value, _ := strings.Cut(word, "=")
			solve.FrontendAttrs[name] = value
			continue
		}
		if i++; i == len(r.words) {
			return solve, nil, fmt.Errorf("%s: a value is missing", word)
		}
		value := r.words[i]
		if word == "-C" {
			dir = filepath.Join(b.context, value)
			continue
		}
		flags[word] = append(flags[word], value)
	}
	if r.verb != "call" {
		outputs := flags["-o"]
		if len(outputs) == 0 && r.verb == "build" {
			outputs = []string{"type=oci"}
		}
		for i, spec := range outputs {
			kind, _, _ := strings.Cut(strings.TrimPrefix(spec, "type="), ",")
			path := filepath.Join(out, fmt.Sprintf("output%d", i))
			if kind != "image" && kind != "cacheonly" {
				spec += ",dest=" + path
			}
			if strings.Contains(spec, "tar=false") {
				kind += "-dir"
			}
			parsed, err := buildctl.ParseOutput([]string{spec})
			if err != nil {
				return solve, nil, err
			}
			output := conformanceOutput{kind: kind, path: path}
			if attrs := parsed[0].Attrs; attrs["push"] == "true" && attrs["push-by-digest"] == "" {
				output.pushed, _, _ = strings.Cut(attrs["name"], ",")
			}
			exports = append(exports, output)
			solve.Exports = append(solve.Exports, parsed...)
		}
	}
	locals := flags["--local"]
	if _, remote := solve.FrontendAttrs["context"]; !remote {
		locals = append(locals, "context="+dir, "dockerfile="+dir)
	}
	solve.LocalMounts = map[string]fsutil.FS{}
	if solve.LocalMounts, err = buildctl.ParseLocal(locals); err != nil {
		return solve, nil, err
	}
	layouts := flags["--oci-layout"]
	for name, dir := range b.layouts {
		layouts = append(layouts, name+"="+dir)
		_, digest, err := newestManifest(dir)
		if err != nil {
			return solve, nil, err
		}
		if _, ok := solve.FrontendAttrs["context:"+name]; !ok {
			solve.FrontendAttrs["context:"+name] = "oci-layout://" + name + "@" + digest
		}
	}
	solve.OCIStores = map[string]content.Store{}
	for _, layout := range layouts {
		name, dir, _ := strings.Cut(layout, "=")
		solve.OCIStores[name] = layoutBlobs(dir)
	}
	if secrets := flags["--secret"]; len(secrets) > 0 {
		provider, err := buildctl.ParseSecret(secrets)
		if err != nil {
			return solve, nil, err
		}
		solve.Session = append(solve.Session, provider)
	}
	if ssh := flags["--ssh"]; len(ssh) > 0 {
		configs, err := buildctl.ParseSSH(ssh)
		if err != nil {
			return solve, nil, err
		}
		var provider session.Attachable
		if provider, err = sshprovider.NewSSHAgentProvider(configs); err != nil {
			return solve, nil, err
		}
		solve.Session = append(solve.Session, provider)
	}
	solve.AllowedEntitlements = flags["--allow"]
	if solve.CacheExports, err = buildctl.ParseExportCache(flags["--export-cache"]); err != nil {
		return solve, nil, err
	}
	if solve.CacheImports, err = buildctl.ParseImportCache(flags["--import-cache"]); err != nil {
		return solve, nil, err
	}
	for _, known := range []string{"-o", "--local", "--oci-layout", "--secret", "--ssh", "--allow", "--export-cache", "--import-cache"} {
		delete(flags, known)
	}
	if len(flags) > 0 {
		return solve, nil, fmt.Errorf("unknown flags %v", flags)
	}
	return solve, exports, nil
}

// base makes a layout of an image that later builds know by name.
func (b *conformanceCase) base(ctx context.Context, name string, words []string) error {
	layout := filepath.Join(b.work, name+".layout")
	solve, _, err := b.request(conformanceRequest{verb: "base", words: words}, b.work)
	if err != nil {
		return err
	}
	exports, err := buildctl.ParseOutput([]string{"type=oci,tar=false,dest=" + layout})
	if err != nil {
		return err
	}
	solve.Exports = exports
	if _, err := b.theirs.Solve(ctx, nil, solve, nil); err != nil {
		return err
	}
	b.layouts[name] = layout
	return nil
}

// addStatus adds warnings, the names of steps and what they print.
func (o *observation) addStatus(events <-chan *bkclient.SolveStatus, logs bool) {
	names := map[string]string{}
	output := map[string]*strings.Builder{}
	var warnings []string
	for s := range events {
		for _, v := range s.Vertexes {
			names[v.Digest.String()] = v.Name
		}
		for _, l := range s.Logs {
			if l.Stream != 1 {
				continue // standard error comes in between as it likes
			}
			if output[l.Vertex.String()] == nil {
				output[l.Vertex.String()] = &strings.Builder{}
			}
			output[l.Vertex.String()].Write(l.Data)
		}
		for _, w := range s.Warnings {
			warnings = append(warnings, fmt.Sprintf("warning level %d: %s; %s; %s; at %v", w.Level, w.Short, w.Detail, w.URL, w.Range))
		}
	}
	slices.Sort(warnings)
	for _, w := range warnings {
		o.addf("%s", w)
	}
	for _, name := range slices.Compact(slices.Sorted(maps.Values(names))) {
		o.addf("step %s", inPlatform.ReplaceAllString(masked(name), "[PLATFORM "))
	}
	if !logs {
		return
	}
	for digest, name := range names {
		if text := output[digest]; text != nil && strings.Contains(name, "] RUN") {
			for line := range strings.Lines(text.String()) {
				if !tracing.MatchString(line) {
					o.addf("%s prints: %s", name, strings.TrimRight(line, "\r\n"))
				}
			}
		}
	}
}

// addOutput adds what is in an output.
func (o *observation) addOutput(prefix string, e conformanceOutput, base map[string]bool) error {
	switch e.kind {
	case "oci", "docker":
		f, err := os.Open(e.path)
		if err != nil {
			return err
		}
		defer f.Close()
		blobs, err := readArchive(f)
		if err != nil {
			return err
		}
		return o.addImages(prefix, blobs, base)
	case "oci-dir", "docker-dir":
		blobs, err := readLayoutDir(e.path)
		if err != nil {
			return err
		}
		return o.addImages(prefix, blobs, base)
	case "tar":
		f, err := os.Open(e.path)
		if err != nil {
			return err
		}
		defer f.Close()
		entries, err := readEntries(f)
		for _, e := range entries {
			o.addf("%stree %s", prefix, e)
		}
		return err
	case "local":
		return o.addDirectory(prefix, e.path)
	case "image", "cacheonly":
		return nil
	}
	return errors.New("unknown kind of output " + e.kind)
}

var (
	digests    = regexp.MustCompile(`(sha256:)?[0-9a-f]{64}`)
	sizes      = regexp.MustCompile(`"size":\s*\d+`)
	inPlatform = regexp.MustCompile(`^\[linux/\S+ `)               // a step that several platforms share is called after either
	tracing    = regexp.MustCompile("OTEL_|TRACEPARENT|otel-grpc") // only BuildKit's steps have a socket for traces
	instants   = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`)
	sessions   = regexp.MustCompile(`\b[a-z0-9]{25,26}\b`)
)

// masked takes out of a text what is never the same twice.
func masked(s string) string {
	s = digests.ReplaceAllString(s, "DIGEST")
	s = sizes.ReplaceAllString(s, `"size":SIZE`)
	s = sessions.ReplaceAllString(s, "SESSION")
	return instants.ReplaceAllStringFunc(s, func(text string) string {
		if when, err := time.Parse(time.RFC3339Nano, text); err == nil && when.After(conformanceStart) {
			return "NOW"
		}
		return text
	})
}

// addAnswer adds the answer of a sub-request. The frontend lists warnings in an order that is not always the same.
func (o *observation) addAnswer(prefix string, text []byte) {
	var value map[string]any
	if json.Unmarshal(text, &value) != nil {
		for line := range strings.Lines(string(text)) {
			o.addf("%s: %s", prefix, strings.TrimRight(line, "\n"))
		}
		return
	}
	for _, key := range slices.Sorted(maps.Keys(value)) {
		list, ok := value[key].([]any)
		if !ok {
			o.addValue(prefix+"."+key, value[key])
		}
		var texts []string
		for _, x := range list {
			if m, ok := x.(map[string]any); ok {
				delete(m, "definition") // has the session in it
			}
			text, _ := json.Marshal(x)
			texts = append(texts, string(text))
		}
		slices.Sort(texts)
		for _, x := range texts {
			o.addf("%s.%s: %s", prefix, key, x)
		}
	}
}
