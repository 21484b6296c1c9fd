// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/engine/remotecache"
	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/frontend/dockerfile"
	"github.com/seed-68981b69/slipway/frontend/gateway"
)

// request is a checked SolveRequest.
type request struct {
	ref          string
	session      string
	frontend     string
	definition   *pb.Definition
	opts         map[string]string
	inputs       map[string]*pb.Definition
	exporters    []exporter.Exporter
	entitlements []string
	attests      attests
	// localDirs and localIDs are where local sources come from, by name.
	localDirs map[string]string
	localIDs  map[string]string
	// outputFiles are the client's files that the engine writes itself, by the number of the output.
	outputFiles map[int]string
	// policy is checked for all sources, and the session's client is asked about them; nil and "" when there is none.
	policy        *spb.Policy
	policySession string
	ownRequest
	// cacheImports and cacheExports are caches besides the engine's own.
	cacheImports []remotecache.ImportSpec
	cacheExports []remotecache.ExportSpec
	// sessionExporters says that the client names more outputs when it has seen the result, and askedForExporters that it has.
	sessionExporters, askedForExporters bool
	// internal builds are not recorded.
	internal bool
	// clientFrontend says that the client runs the frontend and talks to the gateway.
	clientFrontend bool
}

// currentCompatibility is the only output format that we make; 0 asks for the current one.
const currentCompatibility = 30

func notSupported(what string) error {
	return status.Error(codes.Unimplemented, "not supported yet: "+what)
}

// parse checks req. Deprecated fields are read as BuildKit reads them.
func (s *Server) parse(ctx context.Context, req *controlapi.SolveRequest) (*request, error) {
	if req.Ref == "" {
		return nil, status.Error(codes.InvalidArgument, "a build needs a ref")
	}
	r := &request{
		ref:          req.Ref,
		session:      req.Session,
		frontend:     req.Frontend,
		opts:         maps.Clone(req.FrontendAttrs),
		inputs:       req.FrontendInputs,
		entitlements: req.Entitlements,
		internal:     req.Internal,
		localIDs:     map[string]string{},

		policy: req.SourcePolicy, policySession: req.SourcePolicySession, sessionExporters: req.EnableSessionExporter,
	}
	if r.opts == nil {
		r.opts = map[string]string{}
	}
	if len(req.Definition.GetDef()) > 0 {
		r.definition = req.Definition
	}
	switch {
	case r.definition != nil && r.frontend != "":
		return nil, status.Error(codes.InvalidArgument, "a build has a definition or a frontend, not both")
	case req.ProxyNetwork:
		return nil, notSupported("proxy network")
	case req.CompatibilityVersion != 0 && req.CompatibilityVersion != currentCompatibility:
		return nil, notSupported("compatibility version other than the current one")
	}
	if req.SourcePolicy != nil {
		if err := gateway.CheckPolicy(req.SourcePolicy); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	if err := r.parseCaches(req.Cache); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.checkEntitlements(req.Entitlements, s.OwnerEntitled && samePeerUser(ctx)); err != nil {
		return nil, err
	}
	for attr, value := range r.opts {
		if name, ok := strings.CutPrefix(attr, "local-sessionid:"); ok {
			r.localIDs[name] = value
		}
	}
	var err error
	if r.outputFiles, err = takeOutputFiles(r.opts, samePeerUser(ctx)); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if r.attests, err = parseAttests(r.opts); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if r.localDirs, err = takeLocalDirs(r.opts, samePeerUser(ctx)); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if r.ownRequest, err = takeOptions(r.opts); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	r.clientFrontend = r.definition == nil && r.frontend == ""
	return r, s.parseExporters(req, r)
}

// checkEntitlements refuses what the engine does not let a client ask for. owner says that it may ask for everything.
func (s *Server) checkEntitlements(names []string, owner bool) error {
	for _, name := range names {
		kind, _, _ := strings.Cut(name, "=") // "device=…"
		if !owner && !slices.Contains(s.Entitlements, kind) {
			return status.Errorf(codes.PermissionDenied,
				"entitlement %s is not allowed by the engine: it must be started with --allow-insecure-entitlement %s, or have it under insecure-entitlements in its configuration file", name, kind)
		}
	}
	return nil
}

// check refuses a frontend that is switched off, or the image source of one that is not among those that may be used.
func (f Frontends) check(name, source string) error {
	if name == dockerfile.Name && f.NoDockerfile || name == gatewayName && f.NoGateway {
		return status.Errorf(codes.PermissionDenied, "frontend %s is switched off in the engine's configuration (frontend.%q.enabled)", name, name)
	}
	if name != gatewayName || len(f.Repositories) == 0 {
		return nil
	}
	repository := func(ref string) string {
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			return ""
		}
		return named.Name()
	}
	for _, allowed := range f.Repositories {
		if r := repository(allowed); r != "" && r == repository(source) {
			return nil
		}
	}
	if source == "" {
		return status.Errorf(codes.PermissionDenied, "the engine's configuration allows only certain images to be frontends (frontend.%q.allowedRepositories)", gatewayName)
	}
	return status.Errorf(codes.PermissionDenied, "frontend image %s: its repository is not among those that the engine's configuration allows (frontend.%q.allowedRepositories)", source, gatewayName)
}

// gatewayName is the frontend that is an image.
const gatewayName = "gateway.v0"

// parseCaches reads where the build's cache comes from and goes to.
func (r *request) parseCaches(c *controlapi.CacheOptions) error {
	var imports, exports []remotecache.Entry
	for _, e := range c.GetImports() {
		imports = append(imports, remotecache.Entry{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	for _, ref := range c.GetImportRefsDeprecated() {
		imports = append(imports, remotecache.Entry{Type: remotecache.TypeRegistry, Attrs: map[string]string{"ref": ref}})
	}
	for _, e := range c.GetExports() {
		exports = append(exports, remotecache.Entry{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	if ref := c.GetExportRefDeprecated(); ref != "" {
		attrs := maps.Clone(c.GetExportAttrsDeprecated())
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs["ref"] = ref
		exports = append(exports, remotecache.Entry{Type: remotecache.TypeRegistry, Attrs: attrs})
	}
	inline, _ := strconv.ParseBool(r.opts["build-arg:BUILDKIT_INLINE_CACHE"])
	if inline && !slices.ContainsFunc(exports, func(e remotecache.Entry) bool { return e.Type == remotecache.TypeInline }) {
		exports = append(exports, remotecache.Entry{Type: remotecache.TypeInline})
	}
	var err error
	if r.cacheExports, err = remotecache.ParseExports(exports); err != nil {
		return err
	}
	r.cacheImports, err = remotecache.ParseImports(imports)
	return err
}

// parseExporters reads the deprecated single exporter too, which clients still send beside the list.
func (s *Server) parseExporters(req *controlapi.SolveRequest, r *request) error {
	exporters := req.Exporters
	if len(exporters) == 0 && req.ExporterDeprecated != "" {
		exporters = []*controlapi.Exporter{{Type: req.ExporterDeprecated, Attrs: req.ExporterAttrsDeprecated}}
	}
	for _, given := range exporters {
		e, err := s.newExporter(r, given.GetType(), given.GetAttrs())
		if err != nil {
			return err
		}
		r.exporters = append(r.exporters, e)
	}
	return nil
}

// newExporter makes one output.
func (s *Server) newExporter(r *request, typ string, given map[string]string) (exporter.Exporter, error) {
	attrs := maps.Clone(given)
	if attrs == nil {
		attrs = map[string]string{}
	}
	// As BuildKit does: the build argument counts for the exporter as well. What is not a number ("context") is for the
	// frontend, which tells exporters what it has found out.
	if epoch, ok := r.opts["build-arg:SOURCE_DATE_EPOCH"]; ok {
		if _, isSet := attrs["source-date-epoch"]; !isSet {
			if _, err := strconv.ParseInt(epoch, 10, 64); err == nil || epoch == "" {
				attrs["source-date-epoch"] = epoch
			}
		}
	}
	return s.Exporters.New(typ, attrs)
}
