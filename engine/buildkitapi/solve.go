// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/engine/explain"
	"github.com/seed-68981b69/slipway/engine/provenance"
	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/frontend/dockerfile"
	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
)

// Solve implements the Control API: it runs one build to its end.
func (s *Server) Solve(ctx context.Context, in *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	req, err := s.parse(ctx, in)
	if err != nil {
		s.builds.refuse(in.Ref)
		return nil, err
	}
	session := &clientSession{manager: s.sessions, authTimeout: s.authTimeout(), id: req.session, localIDs: req.localIDs, direct: req.localDirs, dir: s.Dir}
	s.enter()
	defer func() { s.leave(session.received()) }()
	end := func() {}
	if s.Begin != nil {
		end = s.Begin(req.ref)
	}
	// What comes after the build is written down in the background, under what Begin holds.
	after := func() {}
	defer func() {
		ended := s.settling()
		s.cleanups.Go(func() {
			defer ended()
			after()
			end()
			if req.verifyCache && s.Sweep != nil {
				s.Sweep() // what was made to compare with
			}
		})
	}()
	started := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b := &build{ref: req.ref, events: newEvents(), cancel: cancel}
	recorder := newRecorder(b.events)
	pull := req.opts["image-resolve-mode"] == "pull"
	imports := s.Caches.NewImports(ctx, session)
	defer imports.Close()
	solverBuild := s.Solver.NewBuild(solver.BuildOptions{
		ID: req.ref, Session: session, Writer: recorder, Pull: pull, Verify: req.verifyCache, Jobs: req.jobs, Imports: imports, Mounts: imports,
	})
	made := outcome{origin: s.newOrigin(solverBuild, req, started)}
	defer s.requests.Forget(made.origin)
	var client *gateway.Client
	gatewayOptions := gateway.Options{
		Build:        solverBuild,
		View:         s.View,
		Images:       s.Images,
		Layouts:      s.Layouts,
		Attestations: s.Attestations,
		Sources:      s.Sources,
		Containers:   s.Containers,
		Policy:       req.policy,
		Verifier:     session.verifier(req.policySession),
		Session:      session,
		Pull:         pull,
		BuildID:      req.ref,
		Writer:       recorder,
		SessionID:    req.session,
		Workers:      s.workers(),
		Frontends:    map[string]gwclient.BuildFunc{dockerfile.Name: dockerfile.Build},

		AllowFrontend: s.Frontends.check,
		Import: func(entries []gwclient.CacheOptionsEntry) error {
			specs, err := importSpecs(entries)
			if err == nil {
				imports.Add(specs, client.Step)
			}
			return err
		},
		Solved:       func(ref *gateway.Reference) { s.requests.Add(made.origin, ref) },
		Entitlements: req.entitlements,
		FailedResult: s.FailedResult,
		FailedStep:   s.FailedStep,
	}
	if s.Devices != nil {
		gatewayOptions.Devices = s.Devices // not a typed nil
	}
	client, err = gateway.New(gatewayOptions, req.opts, req.inputs)
	if err != nil {
		solverBuild.Close()
		s.builds.refuse(in.Ref)
		return nil, err
	}
	// Layers that are elsewhere are fetched with what this client may do, whoever needs them.
	ctx = registry.WithAccess(ctx, session.Credentials, session)
	if req.clientFrontend {
		b.bridge = gateway.NewBridge(ctx, client)
		defer func() {
			if err := b.bridge.Close(); err != nil {
				s.Log.Warn("release containers of a frontend", "ref", req.ref, "error", err)
			}
		}()
	}
	if err := s.builds.add(b); err != nil {
		solverBuild.Close()
		return nil, err
	}
	traced := s.traces.begin(ctx)
	recorded := !req.internal && !s.History.Off
	var record *controlapi.BuildHistoryRecord
	if recorded {
		record = s.beginHistory(in, req, started)
	}
	imports.Add(req.cacheImports, client.Step)
	caches := s.Caches.Begin(ctx, req.cacheExports, session, solverBuild, imports, req.opts)
	defer caches.Stop(errors.New("the build has ended"))
	response, err := s.run(ctx, b, client, session, req, imports, caches, &made)
	if err != nil {
		s.saveCaches(ctx, caches, client, err)
	}
	err = req.attests.sbom.explain(err)
	if err != nil && ctx.Err() != nil && errors.Is(err, context.Canceled) {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause
		}
	}
	solverBuild.Close()
	recorder.end()
	if recorded {
		record.CompletedAt = timestamppb.Now()
		s.History.Closing(req.ref)
	}
	s.builds.end(b)
	reports := solverBuild.Reports()
	s.stats.add(started, recorder, err)
	after = func() {
		if recorded {
			s.finishHistory(record, recorder, req, reports, &made, response, err)
		} else {
			recorder.close()
		}
	}
	s.finishTrace(traced, b, recorded, explain.NewRedactor(s.WorkerID, req.opts, reports).Text, err)
	s.Log.Debug("build", "ref", req.ref, "duration", time.Since(started), "error", err)
	if err != nil {
		return nil, err
	}
	if req.verifyCache {
		// Not in the record: there it is part of the explanation, from which secrets are kept out.
		data, err := json.Marshal(cacheVerification(reports))
		if err != nil {
			return nil, err
		}
		response = maps.Clone(response)
		response[VerifyCacheAttr] = string(data)
	}
	return &controlapi.SolveResponse{ExporterResponse: response}, nil
}

// outcome is what is known of a build's result besides what the client is told.
type outcome struct {
	origin *provenance.Build
	// result is set when there is one.
	result *origin
	// responses are what each export tells the client.
	responses []map[string]string
}

// saveCaches exports what a build has finished that has failed, as far as that is wanted.
func (s *Server) saveCaches(ctx context.Context, caches *remotecache.Exports, client *gateway.Client, cause error) {
	if ctx.Err() != nil {
		caches.Stop(cause)
		return
	}
	if _, err := caches.Finish(ctx, nil, true, client.Step); err != nil {
		s.Log.Warn("export the cache of a build that has failed", "error", err)
	}
}

// importSpecs reads what a frontend asks for.
func importSpecs(entries []gwclient.CacheOptionsEntry) ([]remotecache.ImportSpec, error) {
	var list []remotecache.Entry
	for _, e := range entries {
		list = append(list, remotecache.Entry{Type: e.Type, Attrs: e.Attrs})
	}
	return remotecache.ParseImports(list)
}

// run is one build: frontend, solve, export.
func (s *Server) run(ctx context.Context, b *build, client *gateway.Client, session *clientSession, req *request, imports *remotecache.Imports, caches *remotecache.Exports, made *outcome) (_ map[string]string, err error) {
	var whole map[string]string
	var res *gwclient.Result
	if req.clientFrontend {
		res, err = b.bridge.Wait(ctx)
	} else {
		res, err = client.Solve(ctx, gwclient.SolveRequest{
			Definition: req.definition, Frontend: req.frontend, FrontendOpt: req.opts, FrontendInputs: req.inputs,
		})
	}
	if err != nil {
		return nil, err
	}
	if isAnswer(res) {
		// docker buildx bake --check asks with the outputs of its targets: an empty image must not take the place of a real one.
		return frontendMetadata(res.Metadata), nil
	}
	if req.plan {
		return plan(ctx, made.origin.Solver, res, imports)
	}
	if req.wholeCache {
		if whole, err = takeWhole(ctx, imports); err != nil {
			return nil, err
		}
		caches.Whole()
	}
	early := s.begin(ctx, session, req, made.origin.Solver, res, caches)
	defer func() { early.end(err) }()
	var result exporter.Result
	for try := 1; ; try++ {
		result, err = s.finish(ctx, b, client, session, req, caches, made, res, early)
		if err == nil {
			break
		}
		// What an export reads was in an imported cache, and is gone: it is made.
		unfetched := errors.Is(err, layer.ErrUnavailable) || errors.Is(err, layer.ErrFalseIndex)
		if !unfetched || try == maxTries || !made.origin.Solver.ForgetLost(ctx, snapshots(result)...) {
			return nil, err
		}
	}
	response := mergeResponses(req.exporters, made.responses)
	maps.Copy(response, frontendMetadata(result.Metadata))
	cached, err := caches.Finish(ctx, snapshots(result), false, client.Step)
	if err != nil {
		return nil, err
	}
	maps.Copy(response, cached)
	maps.Copy(response, whole)
	return response, tellExported(ctx, session, req, response)
}

// mergeResponses is what the client is told by several exports together: the last one's word counts, but for images that only this engine
// has. The digest of what was pushed is the one that a pipeline goes on with.
func mergeResponses(exporters []exporter.Exporter, responses []map[string]string) map[string]string {
	merged := map[string]string{}
	for _, private := range []bool{true, false} {
		for i, e := range exporters {
			p, ok := e.(exporter.Private)
			if private == (ok && p.Private()) && i < len(responses) {
				maps.Copy(merged, responses[i])
			}
		}
	}
	return merged
}

// isAnswer recognises the result of a sub-request (outline, targets, lint): words, and no files that an output could be made of.
func isAnswer(res *gwclient.Result) bool {
	if res.Ref != nil || len(res.Refs) > 0 {
		return false
	}
	for key := range res.Metadata {
		if strings.HasPrefix(key, "result.") {
			return true
		}
	}
	return false
}

// frontendMetadata is what a frontend wants the client to be told.
func frontendMetadata(metadata map[string][]byte) map[string]string {
	response := map[string]string{}
	for key, value := range metadata {
		if strings.HasPrefix(key, "frontend.") {
			response[key] = string(value)
		}
	}
	return response
}

// maxTries is how often a result is evaluated whose layers turn out to be gone.
const maxTries = 5

// snapshots are the root file systems of a result.
func snapshots(r exporter.Result) []snapshot.Snapshot {
	var out []snapshot.Snapshot
	for _, ref := range r.Refs {
		out = append(out, ref.Snapshot)
	}
	return out
}

// finish evaluates what the frontend has returned and exports it.
func (s *Server) finish(ctx context.Context, b *build, client *gateway.Client, session *clientSession, req *request, caches *remotecache.Exports, made *outcome, res *gwclient.Result, early *early) (exporter.Result, error) {
	result, err := evaluate(ctx, made.origin.Solver, res)
	early.built()
	if err != nil {
		return exporter.Result{}, err
	}
	for i, ref := range result.Refs {
		caches.Certain(ref.Snapshot)
		config := ref.Config
		if config == nil {
			if config, err = exporter.DefaultConfig(ref.Platform); err != nil {
				return result, err
			}
		}
		if result.Refs[i].Config, err = caches.Inline(ctx, config, ref.Snapshot); err != nil {
			return result, err
		}
	}
	if made.result, err = capture(made.origin, res); err != nil {
		if req.attests.provenance != nil {
			return result, err
		}
		s.Log.Warn("collect the provenance of a build", "build", req.ref, "error", err)
		made.result = &origin{layers: map[string]exporter.LayerBlobs{}}
	}
	if err := req.attests.sbom.scan(ctx, client, res); err != nil {
		return result, err
	}
	read, err := s.readAttestations(ctx, res)
	if err != nil {
		return result, err
	}
	if err := req.attests.attach(&result, made.result, read); err != nil {
		return result, err
	}
	if err := s.askForExporters(ctx, session, req, result); err != nil {
		return result, err
	}
	made.responses, err = s.exportAll(ctx, b, client, session, req, result, made.result.named)
	return result, err
}

// evaluate solves all references of a frontend's result.
func evaluate(ctx context.Context, b *solver.Build, res *gwclient.Result) (exporter.Result, error) {
	refs := res.Refs
	if refs == nil {
		refs = map[string]gwclient.Reference{"": res.Ref}
	}
	var mu sync.Mutex
	snapshots := make(map[string]snapshot.Snapshot, len(refs))
	group, groupCtx := errgroup.WithContext(ctx)
	for id, ref := range refs {
		group.Go(func() error {
			snap, err := gateway.Snapshot(groupCtx, ref)
			mu.Lock()
			defer mu.Unlock()
			snapshots[id] = snap
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return exporter.Result{}, err
	}
	result, err := exporter.NewResult(res.Metadata, snapshots)
	if err != nil {
		return exporter.Result{}, err
	}
	for i := range result.Refs {
		given, _ := res.FindRef(result.Refs[i].ID)
		ref, err := gateway.AsReference(given)
		if err != nil {
			return exporter.Result{}, err
		}
		if ref != nil {
			result.Refs[i].Chain = b.Chain(ctx, ref.Edge())
			result.Refs[i].Made = b.Made(ref.Edge())
		}
	}
	return result, nil
}

// exportAll runs all exporters at once and returns what each tells the client.
func (s *Server) exportAll(ctx context.Context, b *build, client *gateway.Client, session *clientSession, req *request, r exporter.Result, layers func(string, exporter.LayerBlobs)) ([]map[string]string, error) {
	responses := make([]map[string]string, len(req.exporters))
	group, ctx := errgroup.WithContext(ctx)
	for i, e := range req.exporters {
		group.Go(func() (err error) {
			responses[i], err = s.export(ctx, b, client, clientOutput{session, i, req.outputFiles[i]}, e, r, layers)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return responses, nil
}

// export runs the exporter, shown as a vertex of the build.
func (s *Server) export(ctx context.Context, b *build, client *gateway.Client, output clientOutput, e exporter.Exporter, r exporter.Result, layers func(string, exporter.LayerBlobs)) (map[string]string, error) {
	var response map[string]string
	id := digest.FromString(fmt.Sprintf("export %s %d", b.ref, output.id))
	err := client.Step(ctx, e.Name(), id, func(env *solver.Env) (err error) {
		ctx := registry.WithProgress(ctx, env.Progress.Status)
		response, err = e.Export(ctx, r, exporter.Options{
			Progress:    env.Progress,
			Credentials: output.session.Credentials,
			Tokens:      output.session,
			Output:      output,
			Layers:      layers,
		})
		return err
	})
	return response, err
}

// timestampKey is the header by which clients correct for a clock that differs from ours.
const timestampKey = "buildkit-current-timestamp"

// Status implements the Control API: it sends the events of a build from the beginning until it ends.
func (s *Server) Status(req *controlapi.StatusRequest, stream controlapi.Control_StatusServer) error {
	if err := stream.SendHeader(metadata.Pairs(timestampKey, time.Now().Format(time.RFC3339Nano))); err != nil {
		return err
	}
	if s.builds.find(req.Ref) == nil {
		if found, err := s.sendKept(req.Ref, stream); found || err != nil {
			return err
		}
	}
	b, err := s.builds.get(stream.Context(), req.Ref)
	if err != nil {
		return err
	}
	return b.events.listen(stream.Context(), func(st *bkclient.SolveStatus) error {
		for _, response := range st.Marshal() {
			if err := stream.Send(response); err != nil {
				return err
			}
		}
		return nil
	})
}
