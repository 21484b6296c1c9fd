// SPDX-License-Identifier: Apache-2.0

// Package gateway is what a frontend sees of a build: BuildKit's gateway client over solver.Build, and the same over gRPC
// (LLBBridge) for frontends that run in the client's process, which is how buildctl and buildx build.
//
// A reference is lazy: it is solved when it is evaluated, read or exported. Reading goes through the layer index,
// so nothing is mounted. Frontends may run containers (NewContainer), and may be images themselves (`# syntax=`, gateway.v0).
package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/util/urlutil"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/solver"
	"github.com/seed-68981b69/slipway/solver/op"
)

// Product names us to frontends.
const Product = "slipway"

// Builder is the part of solver.Build that a frontend's requests come down to.
type Builder interface {
	Load(def *pb.Definition) (solver.Edge, error)
	Result(ctx context.Context, edge solver.Edge) (snapshot.Snapshot, error)
}

// Files is read access to a solved reference; snapshot.View implements it.
type Files interface {
	index.Tree
	OpenFile(ctx context.Context, path string) (io.ReadCloser, error)
}

// ImageResolver finds out what an image name stands for now. mode is LLB's image.resolvemode: "", "default", "pull" or
// "local". It returns the manifest's digest and the image config. Errors name the image.
type ImageResolver func(ctx context.Context, env *solver.Env, ref string, platform *ocispec.Platform, mode string) (digest.Digest, []byte, error)

// LayoutResolver finds out what ref, NAME@DIGEST, is in the OCI layout that a client offers as store; session names the client, ""
// being the build's own. It returns the digest and the image config.
type LayoutResolver func(ctx context.Context, env *solver.Env, ref, session, store string, platform *ocispec.Platform) (digest.Digest, []byte, error)

// AttestationResolver finds the documents by which a policy can judge an image: its index, the attestation manifest of the platform, the
// signature of that, and the statements of these predicate types.
type AttestationResolver func(ctx context.Context, env *solver.Env, ref string, platform *ocispec.Platform, mode string, predicates []string) (*sourceresolver.AttestationChain, error)

// Options are what the clients of one build share.
type Options struct {
	Build Builder
	// View opens a solved snapshot for reading.
	View    func(ctx context.Context, s snapshot.Snapshot) (Files, error)
	Images  ImageResolver
	Layouts LayoutResolver
	// Attestations may be nil: then frontends and policies cannot ask for those of images.
	Attestations AttestationResolver
	// Sources makes the source of an operation, to be asked what it stands for; nil answers for images only.
	Sources func(*pb.SourceOp) (solver.Source, error)
	// Policy is checked for every source of the build; may be nil. Verifier is asked after it; may be nil.
	Policy   *spb.Policy
	Verifier PolicyVerifier
	// Session, Pull and BuildID are handed to Images and Layouts.
	Session solver.Session
	Pull    bool
	BuildID string
	// Writer takes what a frontend reports itself: metadata look-ups and warnings.
	Writer    solver.Writer
	SessionID string
	Workers   []gwclient.WorkerInfo
	// Frontends are what Solve{Frontend} may name.
	Frontends map[string]gwclient.BuildFunc
	// Containers runs the containers of frontends, and frontends that are images; nil refuses both.
	Containers *op.Containers
	// AllowFrontend refuses a frontend that the engine does not run; source is the image that gateway.v0 is asked for, "" for one that the
	// client itself brings. nil allows all.
	AllowFrontend func(name, source string) error
	// Import has the build use more caches; nil refuses them.
	Import func([]gwclient.CacheOptionsEntry) error
	// Solved, when set, is told of every reference that a frontend has returned, which need not be evaluated.
	Solved func(*Reference)
	// Entitlements are what the client allows its build to ask for.
	Entitlements []string
	// Devices finds CDI devices, for which a build needs an entitlement unless they are for everybody; nil when there are none.
	Devices op.Devices
	// FailedResult finds what a failed step has left that the store keeps beyond its build; may be nil.
	FailedResult func(ctx context.Context, resultID string) (snapshot.Snapshot, error)
	// FailedStep finds what the store keeps of a failed step, by its ID; may be nil.
	FailedStep func(id string) (*cache.FailedStep, error)
}

// Client is a gateway client for one frontend. It may be used concurrently.
type Client struct {
	*shared
	opts   map[string]string
	inputs map[string]*pb.Definition
	// request is what the frontend was asked for, nil for the outermost client; asked is what it has asked us for.
	request *Request
	asked   *asked
}

var _ gwclient.Client = (*Client)(nil)

// shared is what a frontend and the frontends it calls have in common.
type shared struct {
	Options
	allowed entitlements

	mu sync.Mutex // guards results
	// results are the files of failed vertices, by the names that errors have for them.
	results map[string]snapshot.Snapshot
}

// New returns the client of a build's outermost frontend, with the options and inputs of the request.
func New(options Options, opts map[string]string, inputs map[string]*pb.Definition) (*Client, error) {
	allowed, err := parseEntitlements(options.Entitlements)
	if err != nil {
		return nil, err
	}
	return (&shared{Options: options, allowed: allowed, results: map[string]snapshot.Snapshot{}}).client(opts, inputs), nil
}

// client clones opts because frontends write into what BuildOpts returns.
func (s *shared) client(opts map[string]string, inputs map[string]*pb.Definition) *Client {
	opts = maps.Clone(opts)
	if opts == nil {
		opts = map[string]string{}
	}
	return &Client{shared: s, opts: opts, inputs: inputs, asked: &asked{}}
}

// Solve takes a definition and returns a lazy reference to its result, or runs another frontend.
func (c *Client) Solve(ctx context.Context, req gwclient.SolveRequest) (*gwclient.Result, error) {
	req = req.Clone()
	if len(req.CacheImports) > 0 {
		if c.Import == nil {
			return nil, fmt.Errorf("not supported: cache import of type %q", req.CacheImports[0].Type)
		}
		if err := c.Import(req.CacheImports); err != nil {
			return nil, err
		}
	}
	hasDefinition := req.Definition != nil && len(req.Definition.Def) > 0
	var res *gwclient.Result
	switch {
	case hasDefinition && req.Frontend != "":
		return nil, errors.New("a solve request has a definition or a frontend, not both")
	case hasDefinition:
		ref, err := c.load(ctx, req.Definition, req.SourcePolicies)
		if err != nil {
			return nil, err
		}
		res = gwclient.NewResult()
		res.SetRef(ref)
	case req.Frontend != "":
		var err error
		if res, err = c.runFrontend(ctx, req); err != nil {
			return nil, err
		}
		if err := c.reportSolved(res); err != nil {
			return nil, err
		}
	default:
		return gwclient.NewResult(), nil // scratch
	}
	if req.Evaluate {
		if err := res.EachRef(func(ref gwclient.Reference) error { return ref.Evaluate(ctx) }); err != nil {
			return nil, err
		}
	}
	return res, nil
}

func (c *Client) runFrontend(ctx context.Context, req gwclient.SolveRequest) (*gwclient.Result, error) {
	if c.AllowFrontend != nil {
		if err := c.AllowFrontend(req.Frontend, req.FrontendOpt["source"]); err != nil {
			return nil, err
		}
	}
	name := req.Frontend
	if name == gatewayName {
		if !c.runsBuiltin(req) {
			return c.runImage(ctx, req)
		}
		name = builtinName // which finds "cmdline" set, and does not look at the syntax line again
	}
	build, ok := c.Frontends[name]
	if !ok {
		return nil, fmt.Errorf("not supported: frontend %q", name)
	}
	sub := c.client(req.FrontendOpt, req.FrontendInputs)
	sub.request = &Request{Frontend: name, Opts: maps.Clone(req.FrontendOpt), Inputs: req.FrontendInputs}
	c.asked.addSub(sub)
	return build(ctx, sub)
}

// load hands a definition to the solver, checked and converted by the build's policy and more.
func (c *Client) load(ctx context.Context, def *pb.Definition, more []*spb.Policy) (*Reference, error) {
	if err := c.allowed.check(def, c.Devices); err != nil {
		return nil, err
	}
	policies, err := c.policies(more)
	if err != nil {
		return nil, err
	}
	if def, err = policies.apply(ctx, def); err != nil {
		return nil, fmt.Errorf("failed to load LLB: %w", err)
	}
	edge, err := c.Build.Load(def)
	if err != nil {
		return nil, c.wrapError(err)
	}
	ref := &Reference{shared: c.shared, definition: def, edge: edge, by: c}
	c.asked.addRef(ref)
	return ref, nil
}

// ResolveImageConfig returns the canonical name, the manifest digest and the config of an image.
func (c *Client) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	return sourceresolver.NewImageMetaResolver(c).ResolveImageConfig(ctx, ref, opt)
}

// ResolveSourceMetadata says what a source stands for now, without its content: the digest and config of an image, the commit
// of a git source, the digest of a file. Op is the source after the build's policies.
func (c *Client) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	if op == nil {
		return nil, errors.New("no source")
	}
	op = op.CloneVT()
	policies, err := c.policies(opt.SourcePolicies)
	if err != nil {
		return nil, err
	}
	if policies != nil {
		checked := &pb.Op{Op: &pb.Op_Source{Source: op}}
		if image := opt.ImageOpt; image != nil && image.Platform != nil {
			platform := pb.PlatformFromSpec(*image.Platform)
			checked.Platform = platform
		}
		if err := policies.evaluate(ctx, checked, maxPolicyRounds); err != nil {
			return nil, fmt.Errorf("could not resolve image due to policy: %w", err)
		}
	}
	return c.resolveSource(ctx, op, opt)
}

// resolveSource is ResolveSourceMetadata after the policies.
func (c *Client) resolveSource(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	scheme, name, ok := strings.Cut(op.GetIdentifier(), "://")
	if !ok {
		return nil, fmt.Errorf("source %q has no scheme", op.GetIdentifier())
	}
	switch scheme {
	case "docker-image":
		return c.resolveImage(ctx, op, name, opt)
	case "oci-layout":
		return c.resolveLayout(ctx, op, name, opt)
	case "local", "docker-image+blob", "oci-layout+blob":
		return &sourceresolver.MetaResponse{Op: op}, nil
	case "git", "http", "https":
		return c.resolvePin(ctx, op, opt)
	}
	return nil, fmt.Errorf("not supported yet: metadata of a %s source", scheme)
}

// resolvePin asks the source itself.
func (c *Client) resolvePin(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	switch {
	case c.Sources == nil:
		return nil, fmt.Errorf("metadata of %s is not available here", op.Identifier)
	}
	source, err := c.Sources(op)
	if err != nil {
		return nil, err
	}
	describer, ok := source.(solver.PinDescriber)
	if !ok {
		return nil, fmt.Errorf("not supported yet: metadata of %s", op.Identifier)
	}
	logName := opt.LogName
	if logName == "" {
		logName = "resolve metadata for " + urlutil.RedactCredentials(op.Identifier)
	}
	response := &sourceresolver.MetaResponse{Op: op}
	err = c.Step(ctx, logName, digest.FromString("metadata "+op.Identifier), func(env *solver.Env) error {
		d, err := describer.DescribePin(ctx, env)
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(op.Identifier, "git://"):
			response.Git = &sourceresolver.ResolveGitResponse{Checksum: d.Object, Ref: d.Ref}
			if d.Commit != d.Object {
				response.Git.CommitChecksum = d.Commit
			}
			if opt.GitOpt != nil && opt.GitOpt.ReturnObject {
				err = gitObjects(ctx, env, source, response.Git)
			}
		default:
			response.HTTP = &sourceresolver.ResolveHTTPResponse{Digest: d.Digest, Filename: d.Filename, LastModified: d.LastModified}
			if opt.HTTPOpt != nil && opt.HTTPOpt.ChecksumReq != nil {
				response.HTTP.ChecksumResponse, err = checksum(ctx, env, source, opt.HTTPOpt.ChecksumReq)
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return response, nil
}

func (c *Client) resolveImage(ctx context.Context, op *pb.SourceOp, name string, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	var platform *ocispec.Platform
	mode := op.Attrs[pb.AttrImageResolveMode]
	noConfig, chained := false, false
	if image := opt.ImageOpt; image != nil {
		chained = image.AttestationChain || len(image.ResolveAttestations) > 0
		if chained && c.Attestations == nil {
			return nil, errors.New("attestations of images are not available here")
		}
		platform = image.Platform
		noConfig = image.NoConfig
		if image.ResolveMode != "" {
			mode = image.ResolveMode
		}
	}
	var chain *sourceresolver.AttestationChain
	meta, err := c.resolve(ctx, op, platform, opt.LogName, noConfig, func(env *solver.Env) (digest.Digest, []byte, error) {
		dgst, config, err := c.Images(ctx, env, name, platform, mode)
		if err == nil && chained {
			chain, err = c.Attestations(ctx, env, name, platform, mode, opt.ImageOpt.ResolveAttestations)
		}
		return dgst, config, err
	})
	if err == nil {
		meta.Image.AttestationChain = chain
		c.asked.addImage(ResolvedImage{Ref: name, Platform: platform, Digest: meta.Image.Digest})
	}
	return meta, err
}

func (c *Client) resolveLayout(ctx context.Context, op *pb.SourceOp, name string, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	var platform *ocispec.Platform
	session, store := op.Attrs[pb.AttrOCILayoutSessionID], op.Attrs[pb.AttrOCILayoutStoreID]
	noConfig := false
	if layout := opt.OCILayoutOpt; layout != nil {
		platform = layout.Platform
		if layout.Store.StoreID != "" {
			session, store = layout.Store.SessionID, layout.Store.StoreID
		}
	}
	if image := opt.ImageOpt; image != nil {
		if image.AttestationChain || len(image.ResolveAttestations) > 0 {
			return nil, errors.New("not supported: attestations of an image in an OCI layout")
		}
		if platform == nil {
			platform = image.Platform
		}
		noConfig = image.NoConfig
	}
	meta, err := c.resolve(ctx, op, platform, opt.LogName, noConfig, func(env *solver.Env) (digest.Digest, []byte, error) {
		return c.Layouts(ctx, env, name, session, store, platform)
	})
	if err == nil {
		c.asked.addImage(ResolvedImage{Ref: name, Platform: platform, Digest: meta.Image.Digest, Local: true})
	}
	return meta, err
}

// resolve shows a look-up of op's image as a step, and answers with what it finds.
func (c *Client) resolve(ctx context.Context, op *pb.SourceOp, platform *ocispec.Platform, logName string, noConfig bool, find func(*solver.Env) (digest.Digest, []byte, error)) (*sourceresolver.MetaResponse, error) {
	if logName == "" {
		logName = "resolve image config for " + op.Identifier
	}
	id := op.Identifier
	if platform != nil {
		id += "\x00" + platform.OS + "/" + platform.Architecture + platform.Variant
	}
	response := &sourceresolver.ResolveImageResponse{}
	err := c.Step(ctx, logName, digest.FromString(id), func(env *solver.Env) error {
		dgst, config, err := find(env)
		if err != nil {
			return err
		}
		response.Digest = dgst
		if !noConfig {
			response.Config = config
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &sourceresolver.MetaResponse{Op: op, Image: response}, nil
}

// Step shows f as a vertex of the build: work that is not in the graph. id tells it from others.
func (c *Client) Step(ctx context.Context, name string, id digest.Digest, f func(env *solver.Env) error) error {
	started := time.Now()
	c.Writer.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{{Digest: id, Name: name, Started: &started}}})
	err := f(&solver.Env{
		Session:  c.Session,
		Pull:     c.Pull,
		BuildID:  c.BuildID,
		Progress: &vertexProgress{writer: c.Writer, vertex: id},
	})
	completed := time.Now()
	v := &bkclient.Vertex{Digest: id, Name: name, Started: &started, Completed: &completed}
	if err != nil {
		v.Error = err.Error()
		if ctx.Err() != nil {
			v.Error = context.Canceled.Error()
		}
	}
	c.Writer.Write(&bkclient.SolveStatus{Vertexes: []*bkclient.Vertex{v}})
	return err
}

// BuildOpts returns the request's options and what we can do.
func (c *Client) BuildOpts() gwclient.BuildOpts {
	return gwclient.BuildOpts{
		Opts:      c.opts,
		SessionID: c.SessionID,
		Workers:   c.Workers,
		Product:   Product,
		LLBCaps:   pb.Caps.CapSet(LLBCaps()),
		Caps:      gatewayCapSet(),
	}
}

// Inputs returns the states that the request gave to the frontend.
func (c *Client) Inputs(context.Context) (map[string]llb.State, error) {
	inputs := make(map[string]llb.State, len(c.inputs))
	for name, def := range c.inputs {
		if len(def.GetDef()) == 0 {
			inputs[name] = llb.Scratch()
			continue
		}
		op, err := llb.NewDefinitionOp(def)
		if err != nil {
			return nil, fmt.Errorf("frontend input %q: %w", name, err)
		}
		inputs[name] = llb.NewState(op)
	}
	return inputs, nil
}

// Warn shows a warning at a vertex.
func (c *Client) Warn(_ context.Context, vertex digest.Digest, msg string, opts gwclient.WarnOpts) error {
	level := opts.Level
	if level == 0 {
		level = 1
	}
	c.Writer.Write(&bkclient.SolveStatus{Warnings: []*bkclient.VertexWarning{{
		Vertex:     vertex,
		Level:      level,
		Short:      []byte(msg),
		Detail:     opts.Detail,
		URL:        opts.URL,
		SourceInfo: opts.SourceInfo,
		Range:      opts.Range,
	}}})
	return nil
}

// vertexProgress reports on a vertex that the gateway itself shows.
type vertexProgress struct {
	writer solver.Writer
	vertex digest.Digest

	mu      sync.Mutex // guards started
	started map[string]time.Time
}

func (p *vertexProgress) Log(stream int, data []byte) {
	p.writer.Write(&bkclient.SolveStatus{Logs: []*bkclient.VertexLog{{
		Vertex: p.vertex, Stream: stream, Data: append([]byte(nil), data...), Timestamp: time.Now(),
	}}})
}

func (p *vertexProgress) Status(id string, current, total int64, done bool) {
	now := time.Now()
	p.mu.Lock()
	if p.started == nil {
		p.started = map[string]time.Time{}
	}
	started, ok := p.started[id]
	if !ok {
		started = now
		p.started[id] = now
	}
	p.mu.Unlock()
	s := &bkclient.VertexStatus{ID: id, Vertex: p.vertex, Current: current, Total: total, Timestamp: now, Started: &started}
	if done {
		s.Completed = &now
	}
	p.writer.Write(&bkclient.SolveStatus{Statuses: []*bkclient.VertexStatus{s}})
}

func (p *vertexProgress) Warn(short string) {
	p.writer.Write(&bkclient.SolveStatus{Warnings: []*bkclient.VertexWarning{{Vertex: p.vertex, Level: 1, Short: []byte(short)}}})
}
