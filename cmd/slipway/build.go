// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/distribution/reference"
	dockerconfig "github.com/docker/cli/cli/config"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// buildOptions are the flags of build.
type buildOptions struct {
	tags          []string
	file          string
	target        string
	buildArgs     []string
	noCache       bool
	noCacheFilter []string
	pull          bool
	progress      string
	secrets       []string
	ssh           []string
	labels        []string
	platforms     []string
	push          bool
	quiet         bool
	load          bool
	outputs       []string
	contexts      []string
	addHosts      []string
	network       string
	allow         []string
	idFile        string
	metadataFile  string
	annotations   []string
	cacheFrom     []string
	cacheTo       []string
	call          string
	check         bool
	attestOptions
	verifyCache  bool
	debugOnError bool
	jobs         int
	maxMemory    memorySize
	stepOptions
}

func newBuildCommand(a *app) *cobra.Command {
	var o buildOptions
	cmd := &cobra.Command{
		Use:   "build [flags] DIR|URL|-",
		Short: "Build an image from a Dockerfile",
		Args:  args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.build(cmd.Context(), o, args[0])
		},
	}
	f := cmd.Flags()
	o.addFlags(f)
	f.StringArrayVarP(&o.tags, "tag", "t", nil, "name of the image, may be repeated")
	f.BoolVar(&o.pull, "pull", false, "ask the registry even for base images that are here")
	f.BoolVar(&o.verifyCache, "verify-cache", false, "run what is found in the cache as well, and say what differs (exit status 3)")
	f.Var(&o.maxMemory, "max-memory", "with --standalone: memory for the steps that run at once, like 512m or 2g (default: 80% of the machine's)")
	f.StringArrayVar(&o.labels, "label", nil, "set a label of the image: KEY=VALUE")
	f.StringSliceVar(&o.platforms, "platform", nil, "build for this platform")
	f.BoolVar(&o.push, "push", false, "push the image to its registry")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "print only the image's ID")
	f.BoolVar(&o.load, "load", false, "put the image into the local store, beside what --output makes")
	f.StringArrayVarP(&o.outputs, "output", "o", nil, "what to make, may be repeated: DIR, - for a tar on standard output,\n"+
		"or type=image|registry|local|tar|oci|docker|cacheonly,KEY=VALUE… (default type=image)")
	f.StringArrayVar(&o.addHosts, "add-host", nil, "add a line to /etc/hosts of steps: HOST:IP, or HOST:host-gateway for the engine's host")
	f.StringVar(&o.network, "network", "", "network of RUN steps: default, none or host")
	f.StringArrayVar(&o.attest, "attest", nil, "say something about the result: type=provenance|sbom[,KEY=VALUE…]")
	f.StringVar(&o.provenance, "provenance", "", "where the result comes from: true, false or KEY=VALUE… (mode=min|max)")
	f.StringVar(&o.sbom, "sbom", "", "what is in the result: true, false or KEY=VALUE… (generator=IMAGE)")
	f.StringArrayVar(&o.annotations, "annotation", nil, "annotate the image: [manifest|index|…[PLATFORM]:]KEY=VALUE")
	f.StringArrayVar(&o.cacheFrom, "cache-from", nil, "take results of steps from this cache, may be repeated: REF, or type=registry,ref=REF | type=local,src=DIR (docs/caches.md)")
	f.StringArrayVar(&o.cacheTo, "cache-to", nil, "leave results of steps there, may be repeated: REF, or type=registry,ref=REF | type=local,dest=DIR | type=inline, with KEY=VALUE…:\n"+
		"mode=min|max, compression=gzip|zstd|uncompressed, ignore-error, on-failure")
	f.StringVar(&o.call, "call", "", "ask the Dockerfile instead of building it: check, outline or targets[,format=json]")
	f.BoolVar(&o.check, "check", false, "check the Dockerfile instead of building it")
	o.stepOptions.addFlags(f)
	f.StringVar(&o.idFile, "iidfile", "", "write the image's ID to this file")
	f.StringVar(&o.metadataFile, "metadata-file", "", "write facts about the result to this file, as JSON")
	return cmd
}

// addFlags adds the flags that say what is built and how, which 'slipway run --build' has as well.
func (o *buildOptions) addFlags(f *pflag.FlagSet) {
	f.StringVarP(&o.file, "file", "f", "", "the Dockerfile, - for standard input (default DIR/Dockerfile)")
	f.StringVar(&o.target, "target", "", "build this stage")
	f.StringArrayVar(&o.buildArgs, "build-arg", nil, "set an ARG: KEY=VALUE, or KEY to take it from the environment")
	f.BoolVar(&o.noCache, "no-cache", false, "run every step again")
	f.StringSliceVar(&o.noCacheFilter, "no-cache-filter", nil, "run the steps of these stages again")
	f.BoolVar(&o.debugOnError, "debug-on-error", false, "when a RUN fails, open a shell in what it has left ('slipway debug' does so later)")
	f.IntVar(&o.jobs, "jobs", 0, "run so many steps of this build at once (default: the number of processors)")
	f.StringVar(&o.progress, "progress", envOr("BUILDKIT_PROGRESS", "auto"), "auto, plain, tty, quiet or rawjson [$BUILDKIT_PROGRESS]")
	f.StringArrayVar(&o.secrets, "secret", nil, "give a secret to RUN --mount=type=secret: id=ID[,src=FILE|,env=NAME]")
	f.StringArrayVar(&o.ssh, "ssh", nil, "give an SSH agent or keys to RUN --mount=type=ssh: default|ID[=SOCKET|KEY[,KEY]]")
	f.StringArrayVar(&o.contexts, "build-context", nil, "one more context: NAME=DIR|docker-image://REF|oci-layout://DIR[:TAG][@DIGEST]|URL")
	f.StringSliceVar(&o.allow, "allow", nil, "let the Dockerfile ask for network.host or security.insecure")
}

func envOr(name, value string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return value
}

// build runs one build and shows it.
func (a *app) build(ctx context.Context, o buildOptions, dir string) error {
	call, err := parseCall(o.call, o.check)
	if err != nil {
		return err
	}
	solve, cleanup, err := o.request(ctx, a, dir)
	if err != nil {
		return err
	}
	defer cleanup()
	out, err := o.readOutputs(a.stdout())
	if err != nil {
		return err
	}
	if err := out.checkMirrors(localSources(dir, o.file)...); err != nil {
		return err
	}
	defer out.discard()
	if err := out.handOver(solve.FrontendAttrs); err != nil {
		return err
	}
	solve.Exports = out.exports
	if err := o.annotate(solve.Exports); err != nil {
		return err
	}
	if call != nil {
		return a.call(ctx, call, solve, o.progress)
	}
	client, response, err := a.solve(ctx, &o, solve)
	if err != nil {
		return err
	}
	if err := out.commit(); err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	var about map[string]json.RawMessage
	if o.metadataFile != "" {
		if about, err = provenanceMetadata(ctx, client, solve.Ref); err != nil {
			return fmt.Errorf("--metadata-file: %w", err)
		}
		if response.ExporterResponse == nil { // a directory has nothing to tell
			response.ExporterResponse = map[string]string{}
		}
		response.ExporterResponse["buildx.build.ref"] = solve.Ref
	}
	if err := a.buildDone(o, response.ExporterResponse, about, out.toStdout); err != nil || !o.verifyCache {
		return err
	}
	return a.verificationDone(o, response.ExporterResponse)
}

// solve runs a build and shows it. Its error is for the user, after what was printed.
func (a *app) solve(ctx context.Context, o *buildOptions, solve bkclient.SolveOpt) (*bkclient.Client, *bkclient.SolveResponse, error) {
	mode := progressui.DisplayMode(o.progress)
	if o.quiet {
		mode = progressui.QuietMode
	}
	display, err := progressui.NewDisplay(a.stderr(), mode)
	if err != nil {
		return nil, nil, fmt.Errorf("--progress %s: %w", o.progress, err)
	}
	client, err := a.buildkit(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := a.checkOwnAttrs(ctx, client, solve.FrontendAttrs); err != nil {
		return nil, nil, err
	}
	a.cacheDirs.read(solve.CacheImports)
	response, warnings, tail, err := solveAndShow(ctx, client, solve, display, mode == progressui.QuietMode)
	a.cacheDirs.release()
	if err != nil {
		why := a.buildError(ctx, err, tail)
		if o.debugOnError && ctx.Err() == nil {
			var exit *exitError
			if failure := a.debugError(ctx, client, *o, solve.Ref, err); failure != nil && !errors.As(failure, &exit) {
				fmt.Fprintf(a.stderr(), "slipway: %v\n", message(failure))
			}
		}
		return nil, nil, why
	}
	if mode != progressui.QuietMode && mode != progressui.RawJSONMode {
		showWarnings(a.stderr(), warnings)
	}
	return client, response, nil
}

// request is what a build asks the engine for, but for its outputs. Call cleanup when it has ended.
func (o *buildOptions) request(ctx context.Context, a *app, dir string) (solve bkclient.SolveOpt, cleanup func(), err error) {
	solve = bkclient.SolveOpt{
		Frontend:      "dockerfile.v0",
		FrontendAttrs: map[string]string{},
		LocalMounts:   map[string]fsutil.FS{},
		Ref:           identity.NewID(),
	}
	if solve.CacheImports, err = cacheOptions("--cache-from", o.cacheFrom); err != nil {
		return solve, nil, err
	}
	if solve.CacheExports, err = cacheOptions("--cache-to", o.cacheTo); err != nil {
		return solve, nil, err
	}
	from, err := a.addContext(&solve, o.file, dir)
	if err != nil {
		return solve, nil, err
	}
	defer func() {
		if err != nil {
			from.cleanup()
		}
	}()
	if solve.SourcePolicy, err = readSourcePolicy(); err != nil {
		return solve, nil, err
	}
	for _, add := range []func() error{
		func() error { return o.addAttrs(&solve, a.hostGateway(ctx, o.network)) },
		func() error { return o.stepOptions.addAttrs(solve.FrontendAttrs) },
		func() error { return addEpoch(ctx, solve.FrontendAttrs, dir, a.stderr()) },
		func() error { return o.attestOptions.addAttrs(solve.FrontendAttrs) },
		func() error { return o.addOwnAttrs(a, &solve) },
	} {
		if err := add(); err != nil {
			return solve, nil, err
		}
	}
	for _, spec := range o.contexts {
		if err := addNamedContext(&solve, spec); err != nil {
			return solve, nil, err
		}
	}
	if solve.Session, err = a.attachables(*o); err != nil {
		return solve, nil, err
	}
	if from.session != nil {
		solve.Session = append(solve.Session, from.session)
	}
	return solve, from.cleanup, nil
}

// localSources are the files of this host that a build is made of, as far as its main context goes.
func localSources(dir, file string) []string {
	var sources []string
	for _, path := range []string{dir, file} {
		if path != "" && path != "-" && exists(path) {
			sources = append(sources, path)
		}
	}
	return sources
}

// solveAndShow runs the build. The display gets to its end even when the build is canceled. It returns the frontend's warnings,
// and with keepTail the last output of a step that failed.
func solveAndShow(ctx context.Context, client *bkclient.Client, solve bkclient.SolveOpt, display progressui.Display, keepTail bool) (*bkclient.SolveResponse, []bkclient.VertexWarning, []byte, error) {
	var response *bkclient.SolveResponse
	var warnings []bkclient.VertexWarning
	events := make(chan *bkclient.SolveStatus)
	shown := events
	var tail logTail
	group := errgroup.Group{}
	if keepTail {
		shown = make(chan *bkclient.SolveStatus)
		group.Go(func() error {
			defer close(shown)
			for s := range events {
				tail.add(s)
				shown <- s
			}
			return nil
		})
	}
	group.Go(func() (err error) {
		response, err = client.Solve(ctx, nil, solve, events)
		return err
	})
	group.Go(func() (err error) {
		warnings, err = display.UpdateFrom(context.WithoutCancel(ctx), shown)
		return err
	})
	err := group.Wait()
	return response, warnings, tail.failed(), err
}

// showWarnings lists them after the build, as docker does: the display shows only those of steps that it shows anyway.
func showWarnings(w io.Writer, warnings []bkclient.VertexWarning) {
	switch n := len(warnings); n {
	case 0:
		return
	case 1:
		fmt.Fprintf(w, "\n 1 warning found (more about it: slipway build --check):\n")
	default:
		fmt.Fprintf(w, "\n %d warnings found (more about them: slipway build --check):\n", n)
	}
	for _, warning := range warnings {
		fmt.Fprintf(w, " - %s\n", warning.Short)
	}
}

// logTail keeps the end of every step's output.
type logTail struct {
	logs    map[digest.Digest][]byte
	failure digest.Digest
}

const maxTail = 8 << 10

func (t *logTail) add(s *bkclient.SolveStatus) {
	if t.logs == nil {
		t.logs = map[digest.Digest][]byte{}
	}
	for _, l := range s.Logs {
		kept := append(t.logs[l.Vertex], l.Data...)
		if extra := len(kept) - maxTail; extra > 0 {
			kept = bytes.Clone(kept[extra:])
		}
		t.logs[l.Vertex] = kept
	}
	for _, v := range s.Vertexes {
		if v.Error != "" && !strings.Contains(v.Error, context.Canceled.Error()) {
			t.failure = v.Digest
		}
	}
}

func (t *logTail) failed() []byte { return t.logs[t.failure] }

// buildError prints where in the Dockerfile a build has failed and returns one line that says why.
func (a *app) buildError(ctx context.Context, err error, tail []byte) error {
	var interrupted *signalError
	if errors.As(context.Cause(ctx), &interrupted) {
		return interrupted
	}
	if len(tail) > 0 {
		fmt.Fprintf(a.stderr(), "%s\n", bytes.TrimRight(tail, "\n"))
	}
	text := strings.TrimPrefix(message(err), "failed to solve: ")
	text = strings.TrimPrefix(text, grpcerrors.Code(err).String()+": ")
	sources := errdefs.Sources(err)
	for _, s := range sources {
		_ = s.Print(a.stderr())
	}
	if len(sources) > 0 {
		if s := sources[len(sources)-1]; s.Info != nil && len(s.Ranges) > 0 {
			place := fmt.Sprintf("%s:%d: ", s.Info.Filename, s.Ranges[0].Start.Line)
			if !strings.HasPrefix(text, place) {
				text = place + text
			}
		}
	}
	if grpcerrors.Code(err) == codes.Unavailable {
		text = "the engine has ended in the middle of the build: " + text
	}
	return errors.New(text)
}

// buildDone reports the result.
func (a *app) buildDone(o buildOptions, response map[string]string, about map[string]json.RawMessage, stdoutTaken bool) error {
	id := response["containerimage.config.digest"]
	if id == "" {
		id = response["containerimage.digest"] // of several platforms
	}
	if o.quiet && id != "" && !stdoutTaken {
		fmt.Fprintln(a.stdout(), id)
	}
	if o.idFile != "" {
		if id == "" {
			return fmt.Errorf("--iidfile %s: this output has no image ID", o.idFile)
		}
		if err := os.WriteFile(o.idFile, []byte(id), 0o644); err != nil {
			return fmt.Errorf("--iidfile: %w", err)
		}
	}
	if o.metadataFile != "" {
		data, err := metadata(response, about)
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.metadataFile, data, 0o644); err != nil {
			return fmt.Errorf("--metadata-file: %w", err)
		}
	}
	return nil
}

// metadata is the response as JSON; what BuildKit sends as base64 of JSON is unpacked.
func metadata(response map[string]string, about map[string]json.RawMessage) ([]byte, error) {
	out := map[string]any{}
	for k, v := range about {
		out[k] = v
	}
	for k, v := range response {
		out[k] = v
		if data, err := base64.StdEncoding.DecodeString(v); err == nil {
			var object map[string]any
			if json.Unmarshal(data, &object) == nil && len(object) > 0 {
				out[k] = json.RawMessage(data)
			}
		}
	}
	data, err := json.MarshalIndent(out, "", "  ")
	return append(data, '\n'), err
}

// remoteContext tells addresses from directories.
func remoteContext(name string) bool {
	return slices.ContainsFunc([]string{"http://", "https://", "git://", "git@", "github.com/"}, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return pathReason(err)
	}
	if !info.IsDir() {
		return errors.New("not a directory")
	}
	return nil
}

// pathReason is err without the path, for messages that have named it.
func pathReason(err error) error {
	var pathError *os.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}

// addLocal offers a directory to the build under a name. An engine on this host with our user may read it itself.
func addLocal(solve *bkclient.SolveOpt, name, dir string) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	// The engine must see what a symlink as context means now, and by our own eyes.
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return fmt.Errorf("context %s: %w", dir, pathReason(err))
	}
	files, err := fsutil.NewFS(abs)
	if err != nil {
		return fmt.Errorf("context %s: %w", dir, err)
	}
	solve.LocalMounts[name] = files
	if host, err := buildkitapi.HostID(); err == nil {
		solve.FrontendAttrs[buildkitapi.HostAttr] = host
		solve.FrontendAttrs[buildkitapi.LocalDirAttr+name] = abs
	}
	return nil
}

// addNamedContext adds what --build-context names.
func addNamedContext(solve *bkclient.SolveOpt, spec string) error {
	name, value, ok := strings.Cut(spec, "=")
	if !ok || name == "" || value == "" {
		return fmt.Errorf("--build-context %s: want NAME=DIR, NAME=docker-image://REF, NAME=oci-layout://DIR[:TAG] or NAME=URL", spec)
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return fmt.Errorf("--build-context %s: %w", spec, err)
	}
	name = strings.TrimSuffix(reference.FamiliarString(named), ":latest")
	switch {
	case strings.HasPrefix(value, layoutScheme):
		if err := addLayout(solve, name, value); err != nil {
			return fmt.Errorf("--build-context %s: %w", spec, err)
		}
		return nil
	case strings.HasPrefix(value, "docker-image://"), strings.HasPrefix(value, "target:"), remoteContext(value):
		solve.FrontendAttrs["context:"+name] = value
		return nil
	}
	if err := checkDir(value); err != nil {
		return fmt.Errorf("--build-context %s: %w", spec, err)
	}
	solve.FrontendAttrs["context:"+name] = "local:" + name
	return addLocal(solve, name, value)
}

// addAttrs translates flags into the frontend's attributes. gateway is asked for the address that host-gateway stands for.
func (o *buildOptions) addAttrs(solve *bkclient.SolveOpt, gateway func() (string, error)) error {
	attrs := solve.FrontendAttrs
	for _, arg := range o.buildArgs {
		key, value, ok := strings.Cut(arg, "=")
		if key == "" {
			return fmt.Errorf("--build-arg %s: want KEY=VALUE or KEY", arg)
		}
		if !ok {
			if value, ok = os.LookupEnv(key); !ok {
				continue // as docker does: an unset variable sets nothing
			}
		}
		attrs["build-arg:"+key] = value
	}
	for _, label := range o.labels {
		key, value, _ := strings.Cut(label, "=")
		if key == "" {
			return fmt.Errorf("--label %s: want KEY=VALUE", label)
		}
		attrs["label:"+key] = value
	}
	if o.target != "" {
		attrs["target"] = o.target
	}
	switch {
	case o.noCache && len(o.noCacheFilter) > 0:
		return errors.New("--no-cache and --no-cache-filter exclude each other")
	case o.noCache:
		attrs["no-cache"] = ""
	case len(o.noCacheFilter) > 0:
		attrs["no-cache"] = strings.Join(o.noCacheFilter, ",")
	}
	if o.pull {
		attrs["image-resolve-mode"] = "pull"
	}
	if len(o.platforms) > 0 {
		attrs["platform"] = strings.Join(o.platforms, ",")
	}
	if len(o.addHosts) > 0 {
		hosts, err := extraHosts(o.addHosts, gateway)
		if err != nil {
			return err
		}
		attrs["add-hosts"] = hosts
	}
	solve.AllowedEntitlements = slices.Clone(o.allow)
	switch o.network {
	case "", "default":
	case "host":
		attrs["force-network-mode"] = "host"
		if !slices.Contains(solve.AllowedEntitlements, "network.host") {
			solve.AllowedEntitlements = append(solve.AllowedEntitlements, "network.host")
		}
	case "none":
		attrs["force-network-mode"] = "none"
	default:
		return fmt.Errorf("--network %s: want default, none or host", o.network)
	}
	return nil
}

// hostGateway is the address of --add-host that stands for the engine's host.
const hostGateway = "host-gateway"

// extraHosts translates docker's HOST:IP or HOST=IP into the frontend's list.
func extraHosts(specs []string, gateway func() (string, error)) (string, error) {
	var fields []string
	for _, spec := range specs {
		i := strings.IndexAny(spec, ":=")
		if i <= 0 {
			return "", fmt.Errorf("--add-host %s: want HOST:IP or HOST:%s", spec, hostGateway)
		}
		host, ip := spec[:i], strings.Trim(spec[i+1:], "[]")
		if ip == hostGateway {
			var err error
			if ip, err = gateway(); err != nil {
				return "", fmt.Errorf("--add-host %s: %w", spec, err)
			}
		}
		if net.ParseIP(ip) == nil {
			return "", fmt.Errorf("--add-host %s: %q is not an IP address", spec, ip)
		}
		fields = append(fields, host+"="+ip)
	}
	return strings.Join(fields, ","), nil
}

// hostGateway asks the engine for the address by which its steps reach its host. It is a part of the steps that have it, and of
// their cache keys.
func (a *app) hostGateway(ctx context.Context, network string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		switch network {
		case "none":
			return "", errors.New("with --network none there is no way to the host")
		case "host":
			return "127.0.0.1", nil
		}
		client, err := a.buildkit(ctx)
		if err != nil {
			return "", err
		}
		workers, err := client.ListWorkers(ctx)
		if err != nil {
			return "", err
		}
		for _, w := range workers {
			if ip := w.Labels[engine.LabelHostGateway]; ip != "" {
				return ip, nil
			}
		}
		return "", errors.New("the engine's steps have no way to its host (see 'slipway info'): give an IP address, or --network host")
	})
}

// parseCSV reads "key=value,key=value"; a lone word is a type.
func parseCSV(text, flag string) (map[string]string, error) {
	out := map[string]string{}
	if text == "" {
		return out, nil
	}
	fields, err := csv.NewReader(strings.NewReader(text)).Read()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", flag, text, err)
	}
	for _, field := range fields {
		key, value, ok := strings.Cut(field, "=")
		if !ok {
			return nil, fmt.Errorf("%s %s: %q is not KEY=VALUE", flag, text, field)
		}
		out[strings.ToLower(strings.TrimSpace(key))] = value
	}
	return out, nil
}

// attachables are what the engine may ask us for during the build.
func (a *app) attachables(o buildOptions) ([]session.Attachable, error) {
	config := dockerconfig.LoadDefaultConfigFile(a.stderr())
	list := []session.Attachable{authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{
		AuthConfigProvider: authprovider.LoadAuthConfig(config),
	})}
	if len(o.secrets) > 0 {
		provider, err := secretProvider(o.secrets)
		if err != nil {
			return nil, err
		}
		list = append(list, provider)
	}
	if len(o.ssh) > 0 {
		provider, err := sshProvider(o.ssh)
		if err != nil {
			return nil, err
		}
		list = append(list, provider)
	}
	return list, nil
}

func secretProvider(specs []string) (session.Attachable, error) {
	var sources []secretsprovider.Source
	for _, spec := range specs {
		fields, err := parseCSV(spec, "--secret")
		if err != nil {
			return nil, err
		}
		source := secretsprovider.Source{ID: fields["id"], Env: fields["env"]}
		kind := fields["type"]
		for _, key := range slices.Sorted(maps.Keys(fields)) {
			switch key {
			case "id", "env":
			case "src", "source":
				source.FilePath = fields[key]
			case "type":
				if kind != "file" && kind != "env" {
					return nil, fmt.Errorf("--secret %s: type %q is neither file nor env", spec, kind)
				}
			default:
				return nil, fmt.Errorf("--secret %s: unknown key %q", spec, key)
			}
		}
		if source.ID == "" {
			return nil, fmt.Errorf("--secret %s: has no id", spec)
		}
		if kind == "env" && source.Env == "" {
			source.Env, source.FilePath = source.FilePath, ""
		}
		if source.FilePath != "" {
			if _, err := os.Stat(source.FilePath); err != nil {
				return nil, fmt.Errorf("--secret %s: %w", spec, pathReason(err))
			}
		}
		if source.Env != "" {
			if _, ok := os.LookupEnv(source.Env); !ok {
				return nil, fmt.Errorf("--secret %s: $%s is not set", spec, source.Env)
			}
		}
		sources = append(sources, source)
	}
	store, err := secretsprovider.NewStore(sources)
	if err != nil {
		return nil, fmt.Errorf("--secret: %w", err)
	}
	return secretsprovider.NewSecretProvider(store), nil
}

func sshProvider(specs []string) (session.Attachable, error) {
	var configs []sshprovider.AgentConfig
	for _, spec := range specs {
		id, paths, ok := strings.Cut(spec, "=")
		config := sshprovider.AgentConfig{ID: id}
		if ok {
			config.Paths = strings.Split(paths, ",")
		}
		configs = append(configs, config)
	}
	provider, err := sshprovider.NewSSHAgentProvider(configs)
	if err != nil {
		return nil, fmt.Errorf("--ssh: %w", err)
	}
	return provider, nil
}
