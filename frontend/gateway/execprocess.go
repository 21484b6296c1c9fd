// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"

	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/sys/signal"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

// NewContainer implements gwpb.LLBBridgeServer.
func (b *Bridge) NewContainer(ctx context.Context, in *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	req := gwclient.NewContainerRequest{
		Hostname: in.Hostname, NetMode: in.Network, ExtraHosts: in.ExtraHosts, Platform: in.Platform, Constraints: in.Constraints,
	}
	if in.ContainerID == "" {
		return nil, grpcstatus.Error(codes.InvalidArgument, "a container needs an ID")
	}
	if slices.Contains(in.ExtraHosts, nil) {
		return nil, grpcstatus.Error(codes.InvalidArgument, "empty extra host")
	}
	tmpfs := make([]*pb.TmpfsOpt, len(in.Mounts))
	for i, m := range in.Mounts {
		if m == nil {
			return nil, grpcstatus.Errorf(codes.InvalidArgument, "mount %d is empty", i)
		}
		tmpfs[i] = m.TmpfsOpt
		mount := gwclient.Mount{
			Dest: m.Dest, Selector: m.Selector, Readonly: m.Readonly, MountType: m.MountType,
			CacheOpt: m.CacheOpt, SecretOpt: m.SecretOpt, SSHOpt: m.SSHOpt,
		}
		if ref, err := b.get(m.ResultID); err != nil {
			mount.ResultID = m.ResultID // or it is what a failed step has left
		} else if ref != nil {
			mount.Ref = ref
		}
		req.Mounts = append(req.Mounts, mount)
	}
	if !slices.ContainsFunc(req.Mounts, func(m gwclient.Mount) bool { return m.Dest == pb.RootMount }) {
		return nil, grpcstatus.Error(codes.InvalidArgument, "a container needs a root mount")
	}
	b.mu.Lock()
	switch _, exists := b.containers[in.ContainerID]; {
	case b.closed:
		b.mu.Unlock()
		return nil, errBridgeClosed
	case exists:
		b.mu.Unlock()
		return nil, grpcstatus.Errorf(codes.AlreadyExists, "container %s exists already", in.ContainerID)
	}
	b.containers[in.ContainerID] = nil // the name is taken
	b.making.Add(1)
	b.mu.Unlock()
	defer b.making.Done()
	ctr, err := b.client.newContainer(ctx, b.ctx, req, tmpfs)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		delete(b.containers, in.ContainerID)
		return nil, err
	}
	b.containers[in.ContainerID] = ctr
	return &gwpb.NewContainerResponse{}, nil
}

var errBridgeClosed = grpcstatus.Error(codes.Unavailable, "the build has ended")

func (b *Bridge) container(id string) (*container, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.containers[id]; c != nil {
		return c, nil
	}
	return nil, grpcstatus.Errorf(codes.NotFound, "no such container: %s (never made or released already)", id)
}

// ReleaseContainer implements gwpb.LLBBridgeServer.
func (b *Bridge) ReleaseContainer(ctx context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	c, err := b.container(req.ContainerID)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	delete(b.containers, req.ContainerID)
	b.mu.Unlock()
	return &gwpb.ReleaseContainerResponse{}, c.Release(ctx)
}

// ReadFileContainer implements gwpb.LLBBridgeServer.
func (b *Bridge) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	c, err := b.container(req.Ref)
	if err != nil {
		return nil, err
	}
	read := gwclient.ReadContainerRequest{ReadRequest: gwclient.ReadRequest{Filename: req.FilePath}, MountIndex: int(req.MountIndex)}
	if req.Range != nil {
		read.Range = &gwclient.FileRange{Offset: int(req.Range.Offset), Length: int(req.Range.Length)}
	}
	data, err := c.ReadFile(ctx, read)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadFileResponse{Data: data}, nil
}

// ReadDirContainer implements gwpb.LLBBridgeServer.
func (b *Bridge) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	c, err := b.container(req.Ref)
	if err != nil {
		return nil, err
	}
	entries, err := c.ReadDir(ctx, gwclient.ReadDirContainerRequest{
		ReadDirRequest: gwclient.ReadDirRequest{Path: req.DirPath, IncludePattern: req.IncludePattern}, MountIndex: int(req.MountIndex),
	})
	if err != nil {
		return nil, err
	}
	return &gwpb.ReadDirResponse{Entries: entries}, nil
}

// StatFileContainer implements gwpb.LLBBridgeServer.
func (b *Bridge) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	c, err := b.container(req.Ref)
	if err != nil {
		return nil, err
	}
	st, err := c.StatFile(ctx, gwclient.StatContainerRequest{StatRequest: gwclient.StatRequest{Path: req.Path}, MountIndex: int(req.MountIndex)})
	if err != nil {
		return nil, err
	}
	return &gwpb.StatFileResponse{Stat: st}, nil
}

// Close releases the containers that the frontend has left behind. No call is answered with a container afterwards.
func (b *Bridge) Close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel(errBridgeClosed)
	b.making.Wait()
	b.mu.Lock()
	left := b.containers
	b.containers = map[string]*container{}
	b.mu.Unlock()
	var errs []error
	for _, c := range left {
		if c != nil {
			errs = append(errs, c.ctr.Release())
		}
	}
	return errors.Join(errs...)
}

// execStream is the server's side of one ExecProcess call, which carries any number of processes.
type execStream struct {
	gwpb.LLBBridge_ExecProcessServer
	sending sync.Mutex
}

// send may be called by several goroutines, which gRPC's own Send may not.
func (s *execStream) send(m *gwpb.ExecMessage) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.Send(m)
}

// execProcess is one process of a stream.
type execProcess struct {
	id     string
	stream *execStream
	proc   gwclient.ContainerProcess
	// started is closed when the client has been told so: output comes after it.
	started chan struct{}
	// stdin takes what the client sends until ended is closed; nil data is the end of the input.
	stdin chan []byte
	ended chan struct{}
	// closedStdin is only used by the receiving goroutine.
	closedStdin bool
}

// maxQueuedInput is how many messages of input wait for a process that does not read; then the stream is not read on, so that
// the client waits too.
const maxQueuedInput = 256

// ExecProcess implements gwpb.LLBBridgeServer. The processes end with the stream.
func (b *Bridge) ExecProcess(stream gwpb.LLBBridge_ExecProcessServer) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	stop := context.AfterFunc(b.ctx, func() { cancel(errBridgeClosed) })
	defer stop()
	messages := make(chan *gwpb.ExecMessage)
	go func() { // ends at the latest when this call does: then there is nothing to receive
		defer close(messages)
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				cancel(err)
				return
			}
			select {
			case messages <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	call := &execCall{bridge: b, stream: &execStream{LLBBridge_ExecProcessServer: stream}, procs: map[string]*execProcess{}}
	err := call.handleAll(ctx, cancel, messages)
	if err == nil {
		call.running.Wait() // the client wants nothing more than the answers
		err = context.Cause(ctx)
	}
	cancel(err)
	call.running.Wait()
	return err
}

// execCall is one call of ExecProcess.
type execCall struct {
	bridge  *Bridge
	stream  *execStream
	procs   map[string]*execProcess
	running sync.WaitGroup
}

// handleAll handles the client's messages to their end.
func (c *execCall) handleAll(ctx context.Context, cancel context.CancelCauseFunc, messages <-chan *gwpb.ExecMessage) error {
	for {
		select {
		case m, ok := <-messages:
			if !ok {
				return context.Cause(ctx)
			}
			if err := c.handle(ctx, cancel, m); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *execCall) handle(ctx context.Context, cancel context.CancelCauseFunc, m *gwpb.ExecMessage) error {
	if m.ProcessID == "" {
		return grpcstatus.Error(codes.InvalidArgument, "a message names no process")
	}
	p := c.procs[m.ProcessID]
	if init := m.GetInit(); init != nil {
		if p != nil {
			return grpcstatus.Errorf(codes.AlreadyExists, "process %s exists already", m.ProcessID)
		}
		p, err := c.bridge.startExec(ctx, c.stream, m.ProcessID, init)
		if err != nil {
			return err
		}
		c.procs[m.ProcessID] = p
		c.running.Go(func() {
			if err := p.finish(ctx, init.Fds); err != nil {
				cancel(err)
			}
		})
		return nil
	}
	if p == nil {
		return grpcstatus.Errorf(codes.NotFound, "no such process: %s", m.ProcessID)
	}
	return p.handle(ctx, m)
}

// checkMeta refuses what belongs to a step or a container, not to one of its processes.
func checkMeta(m *pb.Meta) error {
	name := ""
	switch {
	case m == nil:
		return grpcstatus.Error(codes.InvalidArgument, "a process needs a description (meta)")
	case m.ProxyEnv != nil:
		name = "proxy_env"
	case len(m.ExtraHosts) > 0:
		name = "extraHosts (they belong to NewContainer)"
	case m.Hostname != "":
		name = "hostname (it belongs to NewContainer)"
	case len(m.Ulimit) > 0:
		name = "ulimit"
	case m.CgroupParent != "":
		name = "cgroupParent"
	case len(m.ValidExitCodes) > 0:
		name = "validExitCodes"
	default:
		return nil
	}
	return grpcstatus.Errorf(codes.Unimplemented, "not supported for a process of a frontend's container: %s", name)
}

// checkFds refuses descriptors that a process does not have, and one that is named twice.
func checkFds(fds []uint32) error {
	for i, fd := range fds {
		if fd > 2 {
			return grpcstatus.Errorf(codes.InvalidArgument, "file descriptor %d of a process: there are 0, 1 and 2", fd)
		}
		if slices.Contains(fds[:i], fd) {
			return grpcstatus.Errorf(codes.InvalidArgument, "file descriptor %d of a process is named twice", fd)
		}
	}
	return nil
}

// startExec starts a process and tells the client.
func (b *Bridge) startExec(ctx context.Context, s *execStream, id string, init *gwpb.InitMessage) (*execProcess, error) {
	if err := checkMeta(init.Meta); err != nil {
		return nil, err
	}
	if err := checkFds(init.Fds); err != nil {
		return nil, err
	}
	c, err := b.container(init.ContainerID)
	if err != nil {
		return nil, err
	}
	p := &execProcess{id: id, stream: s, started: make(chan struct{}), ended: make(chan struct{})}
	req := gwclient.StartRequest{
		Args: init.Meta.Args, Env: init.Meta.Env, SecretEnv: init.Secretenv, User: init.Meta.User, Cwd: init.Meta.Cwd,
		Tty: init.Tty, SecurityMode: init.Security, RemoveMountStubsRecursive: init.Meta.RemoveMountStubsRecursive,
	}
	for _, fd := range init.Fds {
		switch fd {
		case 0:
			r, w := io.Pipe()
			req.Stdin = r
			p.stdin = make(chan []byte, maxQueuedInput)
			go p.feed(w)
			context.AfterFunc(ctx, func() { r.Close() })
		case 1:
			req.Stdout = &execOutput{p, 1}
		case 2:
			req.Stderr = &execOutput{p, 2}
		}
	}
	if p.proc, err = c.Start(ctx, req); err != nil {
		// As its end: BuildKit's clients wait for ever when a stream fails instead of telling that the process has started.
		p.proc = &containerProcess{failed: err}
	}
	// If this fails the stream is broken, and the process ends with it.
	_ = s.send(&gwpb.ExecMessage{ProcessID: id, Input: &gwpb.ExecMessage_Started{Started: &gwpb.StartedMessage{}}})
	close(p.started)
	return p, nil
}

// feed hands input to the process.
func (p *execProcess) feed(w *io.PipeWriter) {
	defer w.Close()
	for {
		select {
		case data := <-p.stdin:
			if data == nil {
				return
			}
			if _, err := w.Write(data); err != nil {
				return // it reads no more
			}
		case <-p.ended:
			return
		}
	}
}

// execOutput sends what a process writes.
type execOutput struct {
	p  *execProcess
	fd uint32
}

func (o *execOutput) Write(data []byte) (int, error) {
	<-o.p.started
	err := o.p.stream.send(&gwpb.ExecMessage{ProcessID: o.p.id, Input: &gwpb.ExecMessage_File{
		File: &gwpb.FdMessage{Fd: o.fd, Data: data},
	}})
	return len(data), err
}

func (o *execOutput) Close() error { return nil }

// handle takes a message for a process that was started.
func (p *execProcess) handle(ctx context.Context, m *gwpb.ExecMessage) error {
	switch in := m.Input.(type) {
	case *gwpb.ExecMessage_File:
		if in.File.GetFd() != 0 || p.stdin == nil || p.closedStdin {
			return p.unlessEnded(grpcstatus.Errorf(codes.OutOfRange, "process %s: file descriptor %d takes no input", p.id, in.File.GetFd()))
		}
		if len(in.File.Data) > 0 {
			p.queue(ctx, in.File.Data)
		}
		if in.File.EOF {
			p.closedStdin = true
			p.queue(ctx, nil)
		}
	case *gwpb.ExecMessage_Resize:
		return p.proc.Resize(ctx, gwclient.WinSize{Rows: in.Resize.GetRows(), Cols: in.Resize.GetCols()})
	case *gwpb.ExecMessage_Signal:
		sig, ok := signal.SignalMap[strings.TrimPrefix(in.Signal.GetName(), "SIG")]
		if !ok {
			return grpcstatus.Errorf(codes.InvalidArgument, "unknown signal %q", in.Signal.GetName())
		}
		return p.proc.Signal(ctx, sig)
	default:
		return grpcstatus.Errorf(codes.InvalidArgument, "process %s: unexpected message %T", p.id, m.Input)
	}
	return nil
}

// unlessEnded forgives clients that have not yet heard of the end.
func (p *execProcess) unlessEnded(err error) error {
	select {
	case <-p.ended:
		return nil
	default:
		return err
	}
}

func (p *execProcess) queue(ctx context.Context, data []byte) {
	select {
	case p.stdin <- data:
	case <-p.ended:
	case <-ctx.Done():
	}
}

// finish waits for the end of the process and tells the client: the ends of the outputs, the exit code, and that this was all.
func (p *execProcess) finish(ctx context.Context, fds []uint32) error {
	exitErr := p.proc.Wait()
	close(p.ended)
	send := func(m *gwpb.ExecMessage) error {
		m.ProcessID = p.id
		return p.stream.send(m)
	}
	for _, fd := range fds {
		if fd == 0 {
			continue
		}
		if err := send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_File{File: &gwpb.FdMessage{Fd: fd, EOF: true}}}); err != nil {
			return err
		}
	}
	exit := &gwpb.ExitMessage{}
	if exitErr != nil {
		exit.Code = gwpb.UnknownExitStatus
		if coded, ok := errors.AsType[*gwpb.ExitError](exitErr); ok {
			exit.Code = coded.ExitCode
		}
		st, _ := grpcstatus.FromError(grpcerrors.ToGRPC(ctx, exitErr))
		exit.Error = &status.Status{Code: st.Proto().GetCode(), Message: st.Proto().GetMessage(), Details: st.Proto().GetDetails()}
	}
	if err := send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_Exit{Exit: exit}}); err != nil {
		return err
	}
	return send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_Done{Done: &gwpb.DoneMessage{}}})
}
