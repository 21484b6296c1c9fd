// SPDX-License-Identifier: Apache-2.0

// Package solver decides what to run, when, and what can be reused. It takes LLB as data (a Graph), names every
// vertex by what it depends on (RecipeKey, ContentKey), looks those names up in the action cache, and runs the
// rest in parallel. It knows nothing of frontends, exporters and clients: they call down into it.
package solver

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// RecipeKey names work before it is done: the op and the recipe keys of its inputs.
type RecipeKey digest.Digest

// ContentKey names work by what it will read: the op and the content digests of its inputs.
type ContentKey digest.Digest

// Vertex is one node of a Graph.
type Vertex struct {
	// Digest is the digest of the marshalled pb.Op, which is how LLB names vertices and how progress does.
	Digest digest.Digest
	Op     *pb.Op
	Meta   *pb.OpMetadata
	// Name is what progress shows.
	Name   string
	Inputs []Edge
	// Locations are where in which source file (a Dockerfile) the vertex comes from; Sources[i] is the file of Locations[i].
	Locations []*pb.Location
	Sources   []*pb.SourceInfo
}

// Edge is one output of a vertex.
type Edge struct {
	Vertex *Vertex
	Index  int
}

// Op is what a vertex does. solver/op has one for each kind of pb.Op. Methods may be called concurrently.
type Op interface {
	// Parts lists everything that identifies the work apart from its inputs, readable, in a fixed order. No secrets.
	Parts() []record.Part
	// InputDigest is the digest of what the op can see of its i-th input: the selected paths for a copy or a
	// read-only bind mount, the layers' content digests in order for a root. Equal digests must mean equal results.
	InputDigest(ctx context.Context, env *Env, i int, in snapshot.Snapshot) (digest.Digest, error)
	// Run does the work and returns a snapshot for each output.
	Run(ctx context.Context, env *Env, inputs []snapshot.Snapshot) ([]snapshot.Snapshot, error)
}

// Describer is an Op that can tell what it sees of an input file by file, so that two inputs with different digests can
// be compared.
type Describer interface {
	Op
	// Describes reports whether the op sees files of its i-th input, not all of it as a root file system.
	Describes(i int) bool
	// DescribeInput writes what the op sees of such an input.
	DescribeInput(ctx context.Context, i int, in snapshot.Snapshot, w io.Writer) error
}

// Stacker is an Op that may only put the layers of its inputs on top of each other, without a look into them.
type Stacker interface {
	Op
	// Stacks reports whether this one does.
	Stacks() bool
}

// MemoryUser is an Op whose work may need so much memory that it matters how many of them are at work at once: it runs
// processes. It tells what it has needed by Env.ReportPeakMemory.
type MemoryUser interface {
	Op
	// MemoryLimit is the most that the work can get, in bytes; 0 when nothing limits it.
	MemoryLimit() int64
}

// Source is an Op without inputs whose result is named by its pin: a manifest digest, a commit, a checksum.
// Pin is called once a build, before any key is made.
type Source interface {
	Op
	// Pin resolves what the source stands for now. ByContent says that the pin says nothing (a local context): then
	// Run is called at once and what depends on it is keyed by InputDigest of the result.
	Pin(ctx context.Context, env *Env) (Pin, error)
}

// PinDescriber is a Source that can tell what it stands for now: Pin for those who want to look at it.
type PinDescriber interface {
	Source
	// DescribePin asks what Pin asks. It may be called without Pin and Run.
	DescribePin(ctx context.Context, env *Env) (PinDescription, error)
}

// PinDescription is what a git or HTTP source stands for.
type PinDescription struct {
	// Ref is the full name of a git ref ("" for a commit ID), Object what it names and Commit the commit of that.
	Ref, Object, Commit string
	// Digest and Filename are those of a file from an HTTP server; LastModified is what the server said, nil when it did not.
	Digest       digest.Digest
	Filename     string
	LastModified *time.Time
}

// PinObjectReader is a git source whose objects can be looked at.
type PinObjectReader interface {
	// PinObjects reads what DescribePin would say, in full.
	PinObjects(ctx context.Context, env *Env) (GitObjects, error)
}

// GitObjects are the raw objects of a commit (CommitID) and, when it was named by an annotated tag, of that; Tag is nil for others.
type GitObjects struct {
	CommitID    string
	Commit, Tag []byte
}

// PinHasher is a source of a single file.
type PinHasher interface {
	// PinDigest is the digest of the bytes of the file that DescribePin describes, followed by suffix.
	PinDigest(ctx context.Context, env *Env, algorithm digest.Algorithm, suffix []byte) (digest.Digest, error)
}

// Pin is what a source was resolved to.
type Pin struct {
	Parts     []record.Part
	ByContent bool
	// Resolved is what provenance says that the source was: the digest of an image's manifest or index, as its name stands for it; a
	// commit; the digest of what was downloaded. "" when there is nothing but content.
	Resolved string
}

// Env is what an op may use of the build it runs for. Each call of an op's method has its own.
type Env struct {
	// Session reaches the client that asked for the build: its files, secrets and credentials.
	Session Session
	// Progress takes logs and byte counts for the vertex.
	Progress Progress
	// Pull is the build's option: ask the registry even for what is here.
	Pull bool
	// BuildID names the build.
	BuildID string
	// Unread says that nothing in the build will look into the result, as far as is known: it is exported, or other layers are put
	// on it. An image's layers can stay in the registry then.
	Unread bool
	// Mounts has what cache mounts of other machines contain; may be nil.
	Mounts MountSource

	peakMemory atomic.Int64
}

// MountSource has the content of cache mounts from other machines.
type MountSource interface {
	// RestoreMount writes the content of a cache mount to dir, an empty directory, and says what it was; ok is false if there is none. id is
	// the mount's, from the digest of its first files or "". After an error dir may have a part of it.
	RestoreMount(ctx context.Context, id, from, dir string) (what string, ok bool, err error)
}

// ReportPeakMemory tells how much memory, in bytes, the work has needed at most so far. The largest report is
// recorded with the result. It may be called concurrently.
func (e *Env) ReportPeakMemory(bytes int64) {
	for {
		old := e.peakMemory.Load()
		if bytes <= old || e.peakMemory.CompareAndSwap(old, bytes) {
			return
		}
	}
}

// Session is what a build's client can be asked for. It is implemented above (engine/buildkitapi over
// BuildKit's session; a fake in tests). A nil Session has nothing.
type Session interface {
	// Local makes a directory of the client visible here: files is its content under filter. The tree stays
	// readable until the build ends. Owners are 0:0.
	Local(ctx context.Context, req LocalRequest) (LocalDir, error)
	// Secret returns the value; errors wrap ErrNotFound when the client has none of that name.
	Secret(ctx context.Context, id string) ([]byte, error)
	// SSHAgent returns the path of a unix socket on this host that talks to the client's agent, and a closer.
	SSHAgent(ctx context.Context, id string) (socket string, release func(), err error)
	// Credentials returns the user and secret for a registry host, "" when the client knows none.
	Credentials(ctx context.Context, host string) (user, secret string, err error)
}

// LayoutSession is a Session whose client may offer OCI layouts.
type LayoutSession interface {
	Session
	// LayoutBlob opens a blob of the OCI layout that the client offers under the name store. session names the
	// session of another client; "" is this one. Nothing about the bytes has been verified. Errors wrap ErrNotFound when
	// there is no such layout or no such blob in it.
	LayoutBlob(ctx context.Context, session, store string, dgst digest.Digest) (LayoutBlob, error)
}

// OpenLayoutBlob is s's LayoutBlob. For a session that has no layouts, or none at all, it is an error that wraps ErrNotFound.
func OpenLayoutBlob(ctx context.Context, s Session, session, store string, dgst digest.Digest) (LayoutBlob, error) {
	if l, ok := s.(LayoutSession); ok {
		return l.LayoutBlob(ctx, session, store, dgst)
	}
	return nil, fmt.Errorf("the client offers no OCI layouts: %w", ErrNotFound)
}

// LayoutBlob is an open blob of a client's OCI layout.
type LayoutBlob interface {
	io.ReaderAt
	io.Closer
	// Size in bytes, as the client says.
	Size() int64
}

// Uploader is a Session whose client can send a file that it has announced by an address of the host buildkit-session.
type Uploader interface {
	Session
	// Upload reads the file, which can be done once. Close the reader.
	Upload(ctx context.Context, u *url.URL) (io.ReadCloser, error)
}

// TokenSession is a Session whose client may fetch registry tokens itself, so that its passwords stay with it.
type TokenSession interface {
	Session
	registry.TokenSource
}

// LocalRequest asks for a directory of the client.
type LocalRequest struct {
	Name            string
	IncludePatterns []string
	ExcludePatterns []string
	FollowPaths     []string
	SharedKey       string
}

// LocalDir is a directory on this host with what was asked for, and nothing else unless Filter is set.
type LocalDir struct {
	Path string
	// Filtered says that Path holds just the files asked for (they were transferred). Otherwise Path is the client's
	// own directory and the reader must apply the request's patterns.
	Filtered bool
}

// Progress takes what happens inside one vertex. All methods may be called concurrently; a nil Progress is not allowed.
type Progress interface {
	// Log appends to the vertex's output. stream is 1 or 2.
	Log(stream int, data []byte)
	// Status reports a long-running part in bytes ("sha256:… 3MB/10MB"); done ends it.
	Status(id string, current, total int64, done bool)
	// Warn shows a warning.
	Warn(short string)
}

// Writer takes the events of one build in BuildKit's form.
type Writer interface {
	Write(*client.SolveStatus)
}
