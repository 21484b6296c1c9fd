// SPDX-License-Identifier: Apache-2.0

package provenance

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/solver/llbsolver/provenance"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/moby/buildkit/util/urlutil"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/frontend/gateway"
	"github.com/seed-68981b69/slipway/solver"
)

// Build is what the results of one build have in common.
type Build struct {
	// Solver is the build that the references come from; it may be closed already.
	Solver *solver.Build
	// Request is what the client has asked for.
	Request gateway.Request
	// Requests are those of the builds of this engine, by what has come of them; nil when nobody keeps them.
	Requests *Requests
	// InvocationID is unique for each build.
	InvocationID string
	Started      time.Time
	// CompatibilityVersion is the version of BuildKit's output formats.
	CompatibilityVersion int
	// DockerfileFrontend is the name of the frontend that has DockerfileVersion.
	DockerfileFrontend, DockerfileVersion string
	// Environment is what the engine's administrator has to say about the machine; nil for nothing.
	Environment map[string]any
	// Now is the clock; nil means time.Now.
	Now func() time.Time

	end   sync.Once
	ended time.Time // set by end
}

// Capture collects what is known of a reference of the result, which has been evaluated, and of everything that its frontend has evaluated
// beside the result. id and all tell which of the result's platforms it is for; result has all references of the result.
func (b *Build) Capture(ref *gateway.Reference, id string, all []exptypes.Platform, result []*gateway.Reference) (*Facts, error) {
	by := ref.By()
	c := &provenance.Capture{}
	if err := b.walk(c, ref); err != nil {
		return nil, err
	}
	for _, other := range by.References() {
		if other == ref || !other.Evaluated() || slices.Contains(result, other) {
			continue
		}
		if err := b.walk(c, other); err != nil {
			return nil, err
		}
	}
	var images []types.ImageSource
	for _, i := range by.ResolvedImages() {
		images = append(images, types.ImageSource{Ref: i.Ref, Platform: i.Platform, Digest: i.Digest, Local: i.Local})
	}
	for _, i := range ofPlatform(images, id, all) {
		c.AddImage(i)
	}
	if err := c.OptimizeImageSources(); err != nil {
		return nil, fmt.Errorf("provenance: %w", err)
	}
	c.Sort()
	slices.SortStableFunc(c.Sources.Images, func(x, y types.ImageSource) int {
		return cmp.Or(cmp.Compare(x.Ref, y.Ref), cmp.Compare(formatPlatform(x.Platform), formatPlatform(y.Platform)))
	})
	b.addRequest(c, ref)
	for _, p := range all {
		if p.ID == id || id == "" && len(all) == 1 {
			c.TargetPlatform = platforms.FormatAll(p.Platform)
		}
	}
	return &Facts{build: b, ref: ref, capture: c}, nil
}

func formatPlatform(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	return platforms.FormatAll(*p)
}

// addRequest says what the frontend was asked for, and the build as a whole where that is something else.
func (b *Build) addRequest(c *provenance.Capture, ref *gateway.Reference) {
	request := ref.By().Request()
	if request == nil {
		return // the build brought a definition
	}
	c.Request.Frontend = request.Frontend
	c.Request.Args = args(request.Opts)
	t := &teller{requests: b.Requests, above: []*gateway.Reference{ref}, left: maxTold}
	own := t.tell(*request, c.Sources)
	c.Request.Inputs = own.Request.Inputs
	root := t.tell(b.Request, c.Sources)
	if r := root.Request; (r.Frontend != "" || len(r.Args) > 0 || len(r.Inputs) > 0) && !root.Equal(own) {
		c.Request.Root = root
	}
}

// args are the options of a request as they are told to others.
func args(opts map[string]string) map[string]string {
	out := provenance.FilterArgs(opts)
	for key, value := range out {
		out[key] = redact(value)
	}
	return out
}

// redact takes the credentials out of a value that is an address with some.
func redact(value string) string {
	if u, err := url.Parse(value); err != nil || u.User == nil {
		return value
	}
	return urlutil.RedactCredentials(value)
}

// walk adds what the vertices below a reference say.
func (b *Build) walk(c *provenance.Capture, ref *gateway.Reference) error {
	seen := map[digest.Digest]bool{}
	var visit func(v *solver.Vertex) error
	visit = func(v *solver.Vertex) error {
		if v == nil || seen[v.Digest] {
			return nil
		}
		seen[v.Digest] = true
		for _, in := range v.Inputs {
			if err := visit(in.Vertex); err != nil {
				return err
			}
		}
		switch op := v.Op.Op.(type) {
		case *pb.Op_Source:
			return b.addSource(c, v, op.Source)
		case *pb.Op_Exec:
			addExec(c, op.Exec)
		case *pb.Op_Build:
			c.IncompleteMaterials = true
		}
		return nil
	}
	return visit(ref.Edge().Vertex)
}

func addExec(c *provenance.Capture, op *pb.ExecOp) {
	for _, m := range op.Mounts {
		switch m.MountType {
		case pb.MountType_SECRET:
			c.AddSecret(types.Secret{ID: m.SecretOpt.GetID(), Optional: m.SecretOpt.GetOptional()})
		case pb.MountType_SSH:
			c.AddSSH(types.SSH{ID: m.SSHOpt.GetID(), Optional: m.SSHOpt.GetOptional()})
		}
	}
	for _, s := range op.Secretenv {
		c.AddSecret(types.Secret{ID: s.GetID(), Optional: s.GetOptional()})
	}
	if op.Network != pb.NetMode_NONE {
		c.NetworkAccess = true
	}
}

// addSource adds a source with what it was resolved to.
func (b *Build) addSource(c *provenance.Capture, v *solver.Vertex, op *pb.SourceOp) error {
	pin, _ := b.Solver.Pin(v)
	scheme, name, _ := strings.Cut(op.Identifier, "://")
	switch scheme {
	case "local":
		c.AddLocal(types.LocalSource{Name: name})
		return nil
	case "docker-image", "oci-layout":
		c.AddImage(types.ImageSource{Ref: name, Platform: platformOf(v.Op), Digest: digest.Digest(pin.Resolved), Local: scheme == "oci-layout"})
		return nil
	case "docker-image+blob", "oci-layout+blob":
		c.AddImageBlob(types.ImageBlobSource{Ref: name, Digest: digest.Digest(pin.Resolved), Local: scheme == "oci-layout+blob"})
		return nil
	case "http", "https":
		if pin.Resolved == "" {
			return fmt.Errorf("provenance: %s was not resolved", redact(op.Identifier))
		}
		c.AddHTTP(types.HTTPSource{URL: op.Identifier, Digest: digest.Digest(pin.Resolved)})
		if id := op.Attrs[pb.AttrHTTPAuthHeaderSecret]; id != "" {
			c.AddSecret(types.Secret{ID: id, Optional: true})
		}
		return nil
	case "git":
		remote, err := gitRemote(op)
		if err != nil {
			return fmt.Errorf("provenance: %w", err)
		}
		c.AddGit(types.GitSource{URL: remote, Commit: pin.Resolved})
		for _, id := range []string{op.Attrs[pb.AttrAuthTokenSecret], op.Attrs[pb.AttrAuthHeaderSecret]} {
			if id != "" {
				c.AddSecret(types.Secret{ID: id, Optional: true})
			}
		}
		if id := op.Attrs[pb.AttrMountSSHSock]; id != "" {
			c.AddSSH(types.SSH{ID: id, Optional: true})
		}
		return nil
	}
	c.IncompleteMaterials = true // a scheme that is not known here
	return nil
}

// gitRemote is the address of a git source with the ref behind a hash.
func gitRemote(op *pb.SourceOp) (string, error) {
	name := strings.TrimPrefix(op.Identifier, "git://")
	ref := ""
	if full := op.Attrs[pb.AttrFullRemoteURL]; full != "" {
		_, fragment, _ := strings.Cut(name, "#")
		ref, _, _ = strings.Cut(fragment, ":")
		name = full
	}
	if !gitutil.IsGitTransport(name) {
		name = "https://" + name
	}
	u, err := gitutil.ParseURL(name)
	if err != nil {
		return "", fmt.Errorf("git source %s: %w", redact(op.Identifier), err)
	}
	if u.Opts != nil && ref == "" {
		ref = u.Opts.Ref
	}
	if ref == "" {
		return u.Remote, nil
	}
	return u.Remote + "#" + ref, nil
}

func platformOf(op *pb.Op) *ocispec.Platform {
	p := op.GetPlatform()
	if p == nil || p.OS == "" {
		return nil
	}
	spec := p.Spec()
	return &spec
}

// ofPlatform leaves out of images those for other platforms of the result, where the same image was asked about for each of them.
func ofPlatform(images []types.ImageSource, id string, all []exptypes.Platform) []types.ImageSource {
	if id == "" || len(all) == 0 {
		return images
	}
	var current ocispec.Platform
	for _, p := range all {
		if p.ID == id {
			current = p.Platform
		}
	}
	forAll := map[string]bool{} // refs that were asked about for each platform
	for _, i := range images {
		forAll[i.Ref] = !slices.ContainsFunc(all, func(p exptypes.Platform) bool {
			matcher := platforms.NewMatcher(p.Platform)
			return !slices.ContainsFunc(images, func(o types.ImageSource) bool {
				return o.Ref == i.Ref && o.Platform != nil && matcher.Match(*o.Platform)
			})
		})
	}
	return slices.DeleteFunc(slices.Clone(images), func(i types.ImageSource) bool {
		return forAll[i.Ref] && i.Platform != nil && (i.Platform.OS != current.OS || i.Platform.Architecture != current.Architecture)
	})
}

// clean takes the credentials out of the addresses in an op, which it changes, and what is only for one session.
func clean(op *pb.Op) {
	switch o := op.Op.(type) {
	case *pb.Op_Source:
		o.Source.Identifier = redactIdentifier(o.Source.Identifier)
		maps.DeleteFunc(o.Source.Attrs, func(key, _ string) bool {
			return key == pb.AttrLocalSessionID || key == pb.AttrLocalUniqueID
		})
		for key, value := range o.Source.Attrs {
			o.Source.Attrs[key] = redact(value)
		}
	case *pb.Op_Exec:
		meta := o.Exec.Meta
		for i, e := range meta.GetEnv() {
			if key, value, ok := strings.Cut(e, "="); ok {
				meta.Env[i] = key + "=" + redact(value)
			}
		}
		if p := meta.GetProxyEnv(); p != nil {
			p.HttpProxy, p.HttpsProxy, p.FtpProxy, p.AllProxy = redact(p.HttpProxy), redact(p.HttpsProxy), redact(p.FtpProxy), redact(p.AllProxy)
		}
	}
}

// redactIdentifier is redact for the identifier of a source: that of a git source has no scheme of its own behind "git://".
func redactIdentifier(id string) string {
	if rest, ok := strings.CutPrefix(id, "git://"); ok && strings.Contains(rest, "://") {
		return "git://" + redact(rest)
	}
	return redact(id)
}
