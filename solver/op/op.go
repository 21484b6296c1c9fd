// SPDX-License-Identifier: Apache-2.0

// Package op has what the vertices of a build do: one file for each kind of pb.Op. New turns a vertex into the
// solver.Op that runs it; it checks the whole message first, and a field that is not honoured is refused by its name,
// never ignored. Ops keep no state between calls but for cache mounts, whose locks are shared by all ops of one New.
package op

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/cache/layer"
	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/solver"
)

// The entitlements that a step may need, named as BuildKit's clients name them.
const (
	EntitlementNetworkHost      = "network.host"
	EntitlementSecurityInsecure = "security.insecure"
)

// SourceFunc makes the source of a vertex whose identifier has the scheme it is registered for. The vertex's
// identifier and attributes are not checked yet.
type SourceFunc func(*solver.Vertex) (solver.Source, error)

// Deps is what ops work with.
type Deps struct {
	Snapshots *snapshot.Store
	Layers    *layer.Store
	Executor  executor.Executor
	// Sources are by scheme: "docker-image", "local", "https".
	Sources map[string]SourceFunc
	// Caches are the cache mounts; nil means those of CacheDir.
	Caches *CacheMounts
	// CacheDir keeps the cache mounts if Caches is nil. It belongs to this process alone.
	CacheDir string
	// TempDir is for files that live as long as one step or frontend: unpacked archives, secrets (on a tmpfs of their own).
	TempDir string
	// DefaultNetwork is what a step gets that names no network; "" means a bridge.
	DefaultNetwork executor.NetworkMode
	// DefaultCgroupParent is the cgroup of a step that names none, relative to the engine's.
	DefaultCgroupParent string
	// Allowed says whether the build that env belongs to may use an entitlement. nil allows none.
	Allowed func(env *solver.Env, entitlement string) bool
	// ExtraCA are authorities that steps trust besides those of their images; nil means none.
	ExtraCA *ExtraCA
	// Devices finds CDI devices of the host; nil when there are none.
	Devices Devices
	// BinfmtDir is where the kernel shows its handlers for foreign programs; "" means where it does.
	BinfmtDir string
	// KeepFailed keeps what a failed process has left, as cache.Store.KeepFailed does; nil keeps nothing.
	KeepFailed func(context.Context, *cache.FailedStep) error
	// Now is the clock for files that a build makes; nil means time.Now.
	Now func() time.Time

	digests *inputDigests
}

func (d *Deps) now() time.Time {
	if d.Now == nil {
		return time.Now()
	}
	return d.Now()
}

// New returns the function that makes ops, which may be called concurrently. What an earlier process left in
// TempDir (a tmpfs with secrets, after a crash) is removed.
func New(deps Deps) func(*solver.Vertex) (solver.Op, error) {
	d := &deps
	d.digests = &inputDigests{remote: d.hasRemote}
	caches := deps.Caches
	if caches == nil {
		caches = NewCacheMounts(deps.CacheDir)
	}
	if deps.TempDir != "" {
		_ = os.MkdirAll(deps.TempDir, 0o700) // if it cannot be, the step that needs it says so
		removeStale(deps.TempDir)
	}
	return func(v *solver.Vertex) (solver.Op, error) {
		if v.Op == nil || v.Op.Op == nil {
			return nil, fmt.Errorf("vertex %s has no operation", v.Digest)
		}
		if name, unknown := unknownField(v.Op.ProtoReflect()); unknown {
			return nil, fmt.Errorf("%s has a field that is not supported yet: %s", v.Name, name)
		}
		if f := v.Op.GetConstraints().GetFilter(); len(f) > 0 {
			return nil, notSupported("worker constraint", strings.Join(f, ","))
		}
		if want, got := len(v.Op.Inputs), len(v.Inputs); want != got {
			return nil, fmt.Errorf("vertex %s has %d inputs instead of %d", v.Digest, got, want)
		}
		switch o := v.Op.Op.(type) {
		case *pb.Op_Source:
			return newSource(d, v, o.Source)
		case *pb.Op_Exec:
			return newExec(d, caches, v, o.Exec)
		case *pb.Op_File:
			return newFile(d, v, o.File)
		case *pb.Op_Merge:
			return newMerge(d, v, o.Merge)
		case *pb.Op_Diff:
			return newDiff(d, v, o.Diff)
		case *pb.Op_Passthrough:
			return newPassthrough(d, v, o.Passthrough)
		case *pb.Op_Build:
			return nil, notSupported("operation", "build (LLB from a file of the build)")
		default:
			return nil, notSupported("operation", fmt.Sprintf("%T", o))
		}
	}
}

func notSupported(what, name string) error {
	return fmt.Errorf("%s not supported yet: %s", what, name)
}

// checkLinux refuses other systems' file semantics.
func checkLinux(p *pb.Platform) error {
	if name := p.GetOS(); name != "" && name != "linux" {
		return notSupported("platform", name)
	}
	return nil
}

// unknownField finds a field that a newer client has set and this version of the message does not have.
func unknownField(m protoreflect.Message) (string, bool) {
	if len(m.GetUnknown()) > 0 {
		return string(m.Descriptor().FullName()), true
	}
	name, found := "", false
	visit := func(v protoreflect.Value) bool {
		name, found = unknownField(v.Message())
		return !found
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { return visit(v) })
			}
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				if !visit(v.List().Get(i)) {
					break
				}
			}
		default:
			visit(v)
		}
		return !found
	})
	return name, found
}

// parts puts together what Op.Parts returns.
type parts []record.Part

func (p *parts) add(name, value string) { *p = append(*p, record.Part{Name: name, Value: value}) }

// list adds one part per value, so that a difference names the one that differs.
func (p *parts) list(name string, values []string) {
	for i, v := range values {
		p.add(fmt.Sprintf("%s[%d]", name, i), v)
	}
}

// nonempty adds a part only when there is something to say.
func (p *parts) nonempty(name, value string) {
	if value != "" {
		p.add(name, value)
	}
}

func (p *parts) flag(name string, set bool) {
	if set {
		p.add(name, "true")
	}
}

func (p *parts) platform(pl *pb.Platform) {
	if pl == nil {
		return
	}
	v := pl.OS + "/" + pl.Architecture
	if pl.Variant != "" {
		v += "/" + pl.Variant
	}
	if pl.OSVersion != "" {
		v += " version " + pl.OSVersion
	}
	if len(pl.OSFeatures) > 0 {
		v += " features " + strconv.Quote(strings.Join(pl.OSFeatures, ","))
	}
	p.add("platform", v)
}

// with returns a snapshot of its own with one more layer, or s itself when there is none.
func with(s snapshot.Snapshot, id layer.ID) snapshot.Snapshot {
	if id == "" {
		return s
	}
	return append(s[:len(s):len(s)], id)
}
