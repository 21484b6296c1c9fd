// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	contentlocal "github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/docker/go-units"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/ociindex"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/share"
	"github.com/seed-68981b69/slipway/cache/share/s3"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
	"github.com/seed-68981b69/slipway/solver/op"
)

const cachePlaceHelp = "A cache is named as for --cache-from and --cache-to of build: REF, or type=registry,ref=REF, type=local,src=DIR (dest=DIR), …"

func newCacheExportCommand(a *app) *cobra.Command {
	var progress string
	cmd := &cobra.Command{
		Use:   "export [flags] CACHE…",
		Short: "Export all results of steps that are known here",
		Long:  "Export all results of steps that are known here to shared caches, whichever builds they are of.\n\n" + cachePlaceHelp,
		Args:  args(1, -1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			var solve bkclient.SolveOpt
			if solve.CacheExports, err = cacheOptions("export", args); err != nil {
				return err
			}
			_, err = a.wholeCache(cmd.Context(), solve, progress)
			return err
		},
	}
	cmd.Flags().StringVar(&progress, "progress", "auto", "auto, plain, tty, quiet or rawjson")
	return cmd
}

func newCacheImportCommand(a *app) *cobra.Command {
	var progress string
	cmd := &cobra.Command{
		Use:   "import [flags] CACHE…",
		Short: "Make everything known that shared caches have",
		Long: "Make everything known that shared caches have, so that builds find it without --cache-from. Layers come when they are needed.\n\n" +
			cachePlaceHelp,
		Args: args(1, -1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			var solve bkclient.SolveOpt
			if solve.CacheImports, err = cacheOptions("import", args); err != nil {
				return err
			}
			response, err := a.wholeCache(cmd.Context(), solve, progress)
			if err == nil {
				fmt.Fprintf(a.stdout(), "%s records imported\n", response[buildkitapi.WholeCacheAttr])
			}
			return err
		},
	}
	cmd.Flags().StringVar(&progress, "progress", "auto", "auto, plain, tty, quiet or rawjson")
	return cmd
}

// wholeCache is a build of nothing, whose caches are about everything.
func (a *app) wholeCache(ctx context.Context, solve bkclient.SolveOpt, progress string) (map[string]string, error) {
	display, err := progressui.NewDisplay(a.stderr(), progressui.DisplayMode(progress))
	if err != nil {
		return nil, fmt.Errorf("--progress %s: %w", progress, err)
	}
	if solve.Session, err = a.attachables(buildOptions{}); err != nil {
		return nil, err
	}
	client, err := a.buildkit(ctx)
	if err != nil {
		return nil, err
	}
	solve.FrontendAttrs = map[string]string{buildkitapi.WholeCacheAttr: "true"}
	solve.Internal = true
	if err := a.checkOwnAttrs(ctx, client, solve.FrontendAttrs); err != nil {
		return nil, err
	}
	a.cacheDirs.read(solve.CacheImports)
	defer a.cacheDirs.release()
	events := make(chan *bkclient.SolveStatus)
	var response *bkclient.SolveResponse
	var group errgroup.Group
	group.Go(func() (err error) {
		response, err = client.Build(ctx, solve, "slipway", func(context.Context, gwclient.Client) (*gwclient.Result, error) {
			return gwclient.NewResult(), nil
		}, events)
		return err
	})
	group.Go(func() error {
		_, err := display.UpdateFrom(context.WithoutCancel(ctx), events)
		return err
	})
	if err := group.Wait(); err != nil {
		return nil, a.buildError(ctx, err, nil)
	}
	return response.ExporterResponse, nil
}

// inspectOptions are the flags of cache inspect.
type inspectOptions struct {
	insecure bool
	format   string
	dir      string
	build    buildOptions
}

func newCacheInspectCommand(a *app) *cobra.Command {
	var o inspectOptions
	cmd := &cobra.Command{
		Use:   "inspect [flags] CACHE",
		Short: "Show what a shared cache has, or which steps of a Dockerfile it would spare",
		Long: "Show what a shared cache has: steps, when they were made and last used, and how large their layers are. The engine is not needed.\n" +
			"With --for, say instead which steps of the Dockerfile in a directory would be found. Nothing is run, so a step whose inputs have to be made\n" +
			"first counts as not found, though its result may turn out to be there.\n\n" + cachePlaceHelp,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.format != "" && o.format != "json" {
				return &usageError{fmt.Errorf("--format %s: want json", o.format), cmd.CommandPath()}
			}
			specs, err := cacheOptions("inspect", args)
			if err != nil {
				return err
			}
			if len(specs) != 1 {
				return errors.New("inspect one cache at a time")
			}
			if o.dir != "" {
				return a.inspectFor(cmd.Context(), &o, specs)
			}
			return a.inspectCache(cmd.Context(), &o, specs[0])
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.insecure, "insecure", false, "speak to registries whose certificate nobody vouches for, or that have none")
	f.StringVar(&o.format, "format", "", "json")
	f.StringVar(&o.dir, "for", "", "say which steps of the Dockerfile in this directory would be found")
	f.StringVarP(&o.build.file, "file", "f", "", "with --for: the Dockerfile (default DIR/Dockerfile)")
	f.StringVar(&o.build.target, "target", "", "with --for: this stage")
	f.StringArrayVar(&o.build.buildArgs, "build-arg", nil, "with --for: KEY=VALUE, or KEY to take it from the environment")
	f.StringArrayVar(&o.build.contexts, "build-context", nil, "with --for: one more context, as for build")
	f.StringSliceVar(&o.build.platforms, "platform", nil, "with --for: this platform")
	return cmd
}

// readCache reads the document of a cache.
func readCache(ctx context.Context, o *inspectOptions, spec bkclient.CacheOptionsEntry) (*share.Document, int64, error) {
	var backend share.Backend
	name := ""
	switch spec.Type {
	case "registry":
		f := copyFlags{insecure: o.insecure}
		repository, err := share.OpenRepository(f.registry(), spec.Attrs["ref"], registry.Sources{})
		if err != nil {
			return nil, 0, err
		}
		backend, name = repository, repository.Name()
	case "local":
		dir := spec.Attrs["src"]
		if dir == "" {
			return nil, 0, errors.New("a cache of type local needs src=DIR")
		}
		tag := spec.Attrs["tag"]
		if tag == "" {
			tag = "latest"
		}
		desc, err := ociindex.NewStoreIndex(dir).Get(tag)
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil, 0, fmt.Errorf("there is no cache in directory %s: %w", dir, err)
		case err != nil:
			return nil, 0, err
		case desc == nil:
			return nil, 0, fmt.Errorf("directory %s has no cache with the tag %q", dir, tag)
		}
		store, err := contentlocal.NewStore(dir)
		if err != nil {
			return nil, 0, err
		}
		backend = share.OpenContent(store, desc.Digest)
	case "s3":
		opts, _, err := s3.ParseOptions(spec.Attrs)
		if err != nil {
			return nil, 0, err
		}
		bucket, err := s3.New(opts)
		if err != nil {
			return nil, 0, err
		}
		defer bucket.Close()
		backend, name = bucket, cmp.Or(spec.Attrs["name"], "main")
	default:
		return nil, 0, fmt.Errorf("a cache of type %s cannot be inspected: not supported", spec.Type)
	}
	raw, _, err := backend.Ref(ctx, name)
	if repository, ok := backend.(*share.Repository); ok && errors.Is(err, share.ErrNoCache) {
		raw, err = repository.InlineDocument(ctx)
	}
	if err != nil {
		return nil, 0, err
	}
	d, ignored, err := share.Decode(raw)
	if err == nil && ignored > 0 {
		err = fmt.Errorf("%d records do not fit", ignored)
	}
	return d, int64(len(raw)), err
}

func (a *app) inspectCache(ctx context.Context, o *inspectOptions, spec bkclient.CacheOptionsEntry) error {
	d, size, err := readCache(ctx, o, spec)
	if err != nil {
		return interrupted(ctx, fmt.Errorf("inspect cache: %w", err))
	}
	if o.format == "json" {
		enc := json.NewEncoder(a.stdout())
		enc.SetIndent("", "  ")
		return enc.Encode(d)
	}
	var layers int64
	for i := range d.Layers {
		layers += layerSize(&d.Layers[i])
	}
	steps := cachedSteps(d)
	fmt.Fprintf(a.stdout(), "%d steps, %d layers of %s, document of %s\n\n", len(steps), len(d.Layers), units.HumanSize(float64(layers)), units.HumanSize(float64(size)))
	w := tabwriter.NewWriter(a.stdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "STEP\tMADE\tUSED\tTOOK\tSIZE\tBUILD")
	now := time.Now()
	for _, r := range steps {
		var own int64 // of the layers that the step itself has most likely made: the topmost ones
		for _, out := range r.Outputs {
			if n := len(out); n > 0 {
				own += layerSize(&d.Layers[out[n-1]])
			}
		}
		used := "-"
		if r.Used > 0 {
			used = units.HumanDuration(now.Sub(time.Unix(r.Used, 0))) + " ago"
		}
		fmt.Fprintf(w, "%s\t%s ago\t%s\t%s\t%s\t%.12s\n", shortName(r.Step), units.HumanDuration(now.Sub(r.Created)), used,
			r.Duration.Round(time.Millisecond), units.HumanSize(float64(own)), r.Build)
	}
	if len(d.Mounts) > 0 {
		fmt.Fprintln(w, "\nMOUNT\tUSED\tFILES\tCONTENT\tSIZE")
	}
	for _, m := range d.Mounts {
		var size int64
		for _, desc := range m.Content.Blobs() {
			size += desc.Size
		}
		fmt.Fprintf(w, "%s\t%s ago\t%d\t%s\t%s\n", op.MountName(m.ID), units.HumanDuration(now.Sub(time.Unix(m.Used, 0))), m.Files,
			units.HumanSize(float64(m.Bytes)), units.HumanSize(float64(size)))
	}
	return w.Flush()
}

// layerSize is what a layer takes in the cache. What it shares with others as chunks counts for each.
func layerSize(l *share.Layer) (size int64) {
	if l.Blob != nil {
		return l.Blob.Size
	}
	if l.Chunks != nil {
		for _, desc := range l.Chunks.Blobs() {
			size += desc.Size
		}
	}
	return size
}

func shortName(s record.Step) string {
	name, _, _ := strings.Cut(s.Name, "\n")
	if len(name) > 70 {
		name = name[:67] + "…"
	}
	return name
}

// cachedSteps are the records of a document, each piece of work once, the newest first.
func cachedSteps(d *share.Document) []share.Record {
	var out []share.Record
	content := map[string]bool{}
	for _, r := range d.Records {
		if r.Kind == record.KindRecipe {
			out = append(out, r)
			content[r.Content] = true
		}
	}
	for _, r := range d.Records {
		if r.Kind == record.KindContent && !content[r.Key] {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, func(a, b share.Record) int { return b.Created.Compare(a.Created) })
	return out
}

// inspectFor asks the engine which steps of a Dockerfile would be found.
func (a *app) inspectFor(ctx context.Context, o *inspectOptions, specs []bkclient.CacheOptionsEntry) error {
	if o.insecure && specs[0].Type == "registry" {
		specs[0].Attrs["registry.insecure"] = "true"
	}
	solve := bkclient.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{buildkitapi.PlanAttr: "true"}, LocalMounts: map[string]fsutil.FS{},
		CacheImports: specs, Internal: true,
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	from, err := a.addContext(&solve, o.build.file, dir)
	if err != nil {
		return err
	}
	defer from.cleanup()
	if err := o.build.addAttrs(&solve, a.hostGateway(ctx, o.build.network)); err != nil {
		return err
	}
	for _, spec := range o.build.contexts {
		if err := addNamedContext(&solve, spec); err != nil {
			return err
		}
	}
	if solve.Session, err = a.attachables(o.build); err != nil {
		return err
	}
	if from.session != nil {
		solve.Session = append(solve.Session, from.session)
	}
	client, err := a.buildkit(ctx)
	if err != nil {
		return err
	}
	if err := a.checkOwnAttrs(ctx, client, solve.FrontendAttrs); err != nil {
		return err
	}
	display, err := progressui.NewDisplay(os.Stderr, progressui.QuietMode)
	if err != nil {
		return err
	}
	response, _, tail, err := solveAndShow(ctx, client, solve, display, true)
	if err != nil {
		return a.buildError(ctx, err, tail)
	}
	raw := response.ExporterResponse[buildkitapi.PlanAttr]
	if o.format == "json" {
		_, err := fmt.Fprintln(a.stdout(), raw)
		return err
	}
	var plan buildkitapi.CachePlan
	if err := json.Unmarshal([]byte(raw), &plan); err != nil {
		return fmt.Errorf("the engine's answer: %w", err)
	}
	found := 0
	w := tabwriter.NewWriter(a.stdout(), 0, 0, 2, ' ', 0)
	for _, s := range plan.Steps {
		what := "not found"
		if s.Found != "" {
			found++
			what = "found"
		}
		build := ""
		if s.Build != "" {
			build = "made by build " + s.Build
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", what, shortName(record.Step{Name: s.Name}), build)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.stdout(), "\n%d of %d steps are in the cache\n", found, len(plan.Steps))
	return err
}
