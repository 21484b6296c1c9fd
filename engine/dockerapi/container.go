// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/executor"
)

// ctr is one container. It goes created → running → exited → (running …) → removed.
type ctr struct {
	id        string
	name      string
	image     Image
	imageName string // as it was asked for
	config    *container.Config
	host      *container.HostConfig
	plan      *plan
	created   time.Time
	streams   *streams

	// op is held while the container is started or removed.
	op sync.Mutex

	mu    sync.Mutex // guards what follows
	state container.ContainerState
	// exit is how the last process ended, next what will be told about the next one.
	exit     exitStatus
	next     *exitEvent
	started  time.Time
	finished time.Time
	process  executor.Process
	cancel   context.CancelCauseFunc
	root     Mount
	mounts   []container.MountPoint
	volumes  []string      // anonymous ones, which go with the container
	gone     chan struct{} // closed when removed
}

type exitStatus struct {
	code int
	oom  bool
	err  string // why it could not be run
	lost bool   // it ran, and how it ended is not known
}

// exitEvent is closed with the status set when a process has ended.
type exitEvent struct {
	done   chan struct{}
	status exitStatus
}

func (c *ctr) summaryState() container.ContainerState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// hostname is the container's name for itself.
func (c *ctr) hostname() string {
	if c.config.Hostname != "" {
		return c.config.Hostname
	}
	return c.id[:12]
}

// list returns the containers, newest first.
func (s *Server) list() []*ctr {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*ctr
	for _, c := range s.containers {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *ctr) int {
		if d := b.created.Compare(a.created); d != 0 {
			return d
		}
		return strings.Compare(a.id, b.id)
	})
	return out
}

// find returns the container of that ID, name or unique prefix of an ID.
func (s *Server) find(ref string) (*ctr, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[ref]; c != nil {
		return c, nil
	}
	if c := s.names[strings.TrimPrefix(ref, "/")]; c != nil {
		return c, nil
	}
	var found *ctr
	for id, c := range s.containers {
		if ref != "" && strings.HasPrefix(id, ref) {
			if found != nil {
				return nil, invalid("multiple IDs found with provided prefix: %s", ref)
			}
			found = c
		}
	}
	if found == nil {
		return nil, notFound("No such container: %s", ref)
	}
	return found, nil
}

// register makes a container known under its name, or under a random one.
func (s *Server) register(c *ctr) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return &Error{http.StatusServiceUnavailable, "the engine is shutting down"}
	}
	if c.name == "" {
		c.name = randomName(func(name string) bool { return s.names[name] != nil })
	} else if other := s.names[c.name]; other != nil {
		return conflict(`Conflict. The container name "/%s" is already in use by container "%s". You have to remove (or rename) that container to be able to reuse that name.`, c.name, other.id)
	}
	s.containers[c.id] = c
	s.names[c.name] = c
	return nil
}

// maxOOMKilled is how many containers that lack of memory has ended can be inspected after they have removed themselves.
const maxOOMKilled = 16

// noteOOM keeps a container that removes itself to be inspected by its ID: there is no other way for its client to learn why it ended.
func (s *Server) noteOOM(c *ctr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oomKilled = append(s.oomKilled, c)
	s.oomKilled = s.oomKilled[max(0, len(s.oomKilled)-maxOOMKilled):]
}

// findOrOOM is find, and finds those that noteOOM has kept.
func (s *Server) findOrOOM(ref string) (*ctr, error) {
	c, err := s.find(ref)
	if err == nil {
		return c, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.IndexFunc(s.oomKilled, func(c *ctr) bool { return c.id == ref }); i >= 0 {
		return s.oomKilled[i], nil
	}
	return nil, err
}

func (s *Server) forget(c *ctr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, c.id)
	if s.names[c.name] == c {
		delete(s.names, c.name)
	}
}

// prepare mounts the root file system and makes the sources of the mounts. What it has made stays with c until it is removed.
func (s *Server) prepare(ctx context.Context, c *ctr) error {
	for i := range c.plan.mounts {
		m := &c.plan.mounts[i]
		point := container.MountPoint{Type: m.kind, Source: m.source, Destination: m.target, Mode: m.optional, RW: !m.readonly}
		switch m.kind {
		case mount.TypeBind:
			if err := bindSource(m); err != nil {
				return err
			}
			point.Propagation = mount.PropagationRPrivate
		case mount.TypeVolume:
			anonymous := m.source == ""
			if anonymous {
				m.source = newID()
			}
			from := ""
			if m.copyUp {
				root, err := s.mountRoot(ctx, c)
				if err != nil {
					return err
				}
				files, err := s.Roots.Files(ctx, c.image.Layers)
				if err != nil {
					return err
				}
				inside, err := index.Resolve(files, m.target, true)
				if err != nil {
					return fmt.Errorf("volume %s: %w", m.target, err)
				}
				from = filepath.Join(root, inside)
			}
			dir, err := s.volumes.ensure(m.source, anonymous, from)
			if err != nil {
				return err
			}
			point.Name, point.Driver, point.Source = m.source, "local", dir
			if anonymous {
				c.volumes = append(c.volumes, m.source)
			}
		}
		c.mounts = append(c.mounts, point)
	}
	return nil
}

// bindSource checks or makes the source of a bind mount.
func bindSource(m *plannedMount) error {
	_, err := os.Stat(m.source)
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return invalid("mount %s: %v", m.target, err)
	case !m.create:
		return invalid(`invalid mount config for type "bind": bind source path does not exist: %s`, m.source)
	}
	if err := os.MkdirAll(m.source, 0o755); err != nil {
		return invalid("error while creating mount source path '%s': %v", m.source, err)
	}
	return nil
}

// mountRoot mounts c's root file system unless it is mounted.
func (s *Server) mountRoot(ctx context.Context, c *ctr) (string, error) {
	c.mu.Lock()
	root := c.root
	c.mu.Unlock()
	if root != nil {
		return root.Path(), nil
	}
	root, err := s.Roots.Mount(ctx, c.image.Layers)
	if err != nil {
		return "", fmt.Errorf("mount the root file system of container %s: %w", c.name, err)
	}
	c.mu.Lock()
	c.root = root
	c.mu.Unlock()
	return root.Path(), nil
}

// spec completes the plan with what only the container and its host know.
func (s *Server) spec(ctx context.Context, c *ctr) (executor.Spec, error) {
	spec := c.plan.spec
	root, err := s.mountRoot(ctx, c)
	if err != nil {
		return spec, err
	}
	files, err := s.Roots.Files(ctx, c.image.Layers)
	if err != nil {
		return spec, err
	}
	user, home, err := resolveUser(ctx, files, c.config.User, c.plan.groups)
	if err != nil {
		return spec, err
	}
	spec.ID = c.id
	spec.Rootfs = root
	spec.User = user
	spec.Hostname = c.hostname()
	if spec.Network == executor.NetworkHost && c.config.Hostname == "" {
		// As docker: the host's own name.
		if name, err := os.Hostname(); err == nil {
			spec.Hostname = name
		}
	}
	spec.Env = environment(c.config.Env, spec.Hostname, home, c.config.Tty)
	for i, m := range c.plan.mounts {
		em := executor.Mount{Kind: executor.MountBind, Source: c.mounts[i].Source, Target: m.target, Readonly: m.readonly, Recursive: m.recursive}
		if m.kind == mount.TypeTmpfs {
			em = executor.Mount{Kind: executor.MountTmpfs, Target: m.target, Readonly: m.readonly, SizeBytes: m.size, Mode: m.mode, NoExec: !m.exec}
		}
		spec.Mounts = append(spec.Mounts, em)
	}
	return spec, nil
}

// start starts c's process; errNotModified when it runs already.
func (s *Server) start(ctx context.Context, c *ctr) error {
	c.op.Lock()
	defer c.op.Unlock()
	switch c.summaryState() {
	case container.StateRunning:
		return errNotModified
	case container.StateRemoving, container.StateDead:
		return conflict("container %s is marked for removal and cannot be started", c.id)
	}
	spec, err := s.spec(ctx, c)
	if err == nil {
		err = s.startProcess(c, spec)
	}
	if err == nil {
		return nil
	}
	code := 128 // as docker: not even tried
	var start *executor.StartError
	if errors.As(err, &start) {
		code = start.Code
		err = &Error{http.StatusBadRequest, startMessage(start, spec.Args[0])}
	} else if text, ok := strings.CutPrefix(err.Error(), "start container "+c.id+": "); ok {
		err = &Error{status(err), "failed to start container: " + text}
	}
	c.ended(exitStatus{code: code, err: err.Error()}, container.StateCreated)
	if c.host.AutoRemove {
		go s.autoRemove(c)
	}
	return err
}

// startMessage has the words by which docker's clients tell 127 from 126.
func startMessage(e *executor.StartError, arg string) string {
	text := e.Error()
	want := ""
	switch e.Code {
	case 127:
		want = "executable file not found in $PATH"
		if strings.Contains(arg, "/") {
			want = "no such file or directory"
		}
	case 126:
		want = "permission denied"
		if strings.Contains(text, "is a directory") {
			want = ""
		}
	}
	if want != "" && !strings.Contains(text, want) {
		text += ": " + want
	}
	return "failed to start container: " + text
}

func (s *Server) startProcess(c *ctr, spec executor.Spec) error {
	// The process outlives the request that started it and dies with the server.
	ctx, cancel := context.WithCancelCause(s.ctx)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		cancel(nil)
		return &Error{http.StatusServiceUnavailable, "the engine is shutting down"}
	}
	s.alive.Add(1)
	s.mu.Unlock()
	stdio := executor.IO{Stdin: c.streams.stdin(), Stdout: c.streams.writer(stdcopy.Stdout), Stderr: c.streams.writer(stdcopy.Stderr)}
	c.mu.Lock()
	c.started, c.finished = time.Now(), time.Time{}
	c.exit = exitStatus{}
	c.mu.Unlock()
	process, err := s.Executor.Start(ctx, spec, stdio)
	if err != nil {
		s.alive.Done()
		cancel(err)
		return err
	}
	c.mu.Lock()
	c.process, c.cancel = process, cancel
	c.state = container.StateRunning
	c.mu.Unlock()
	s.Log.Debug("container started", "container", c.id, "name", c.name)
	go func() {
		defer s.alive.Done()
		exit, err := process.Wait()
		cancel(nil)
		status := exitStatus{code: exit.Code, oom: exit.OOMKilled}
		if err != nil {
			status.err, status.lost = err.Error(), true
			if status.code == 0 {
				status.code = 128
			}
			s.Log.Error("container", "container", c.id, "name", c.name, "error", err)
		}
		s.Log.Debug("container ended", "container", c.id, "name", c.name, "code", status.code)
		if status.oom && c.host.AutoRemove {
			s.noteOOM(c)
		}
		c.ended(status, container.StateExited)
		if c.host.AutoRemove {
			s.autoRemove(c)
		}
	}()
	return nil
}

// ended records how a process ended, and tells who waits for it. Clients see the end of the output first.
func (c *ctr) ended(status exitStatus, state container.ContainerState) {
	c.streams.finish()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != container.StateRemoving {
		c.state = state
	}
	c.exit = status
	c.finished = time.Now()
	c.process, c.cancel = nil, nil
	event := c.next
	c.next = &exitEvent{done: make(chan struct{})}
	event.status = status
	close(event.done)
}

func (s *Server) autoRemove(c *ctr) {
	if err := s.remove(c, true, true); err != nil && status(err) != http.StatusNotFound {
		s.Log.Error("remove container", "container", c.id, "name", c.name, "error", err)
	}
}

// remove deletes c and its root file system. A running one is killed first when force is set.
func (s *Server) remove(c *ctr, force, withVolumes bool) error {
	c.mu.Lock()
	switch {
	case c.state == container.StateRemoving:
		c.mu.Unlock()
		return conflict("removal of container %s is already in progress", c.id)
	case c.state == container.StateRunning && !force:
		c.mu.Unlock()
		return conflict("cannot remove container %q: container is running: stop the container before removing or force remove", "/"+c.name)
	}
	c.mu.Unlock()
	if force {
		s.killAndWait(c)
	}
	c.op.Lock()
	defer c.op.Unlock()
	c.mu.Lock()
	select {
	case <-c.gone:
		c.mu.Unlock()
		return notFound("No such container: %s", c.id)
	default:
	}
	if c.state == container.StateRunning { // started again meanwhile
		c.mu.Unlock()
		return conflict("cannot remove container %q: container is running: stop the container before removing or force remove", "/"+c.name)
	}
	c.state = container.StateRemoving
	root := c.root
	c.root = nil
	c.mu.Unlock()

	c.streams.finish()
	var errs []error
	if root != nil {
		errs = append(errs, root.Release())
	}
	if withVolumes {
		for _, name := range c.volumes {
			errs = append(errs, s.volumes.remove(name))
		}
	}
	s.forget(c)
	close(c.gone)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove container %s: %w", c.name, err)
	}
	return nil
}

// killAndWait kills c's process, if there is one, and returns when it has ended.
func (s *Server) killAndWait(c *ctr) {
	c.mu.Lock()
	cancel, event := c.cancel, c.next
	c.mu.Unlock()
	if cancel == nil {
		return
	}
	c.streams.finish() // a client that does not read must not hold up the end
	cancel(errors.New("the container is being removed"))
	<-event.done
}

// signal sends sig to c's process.
func (c *ctr) signal(sig syscall.Signal) error {
	c.mu.Lock()
	process := c.process
	c.mu.Unlock()
	if process == nil {
		return conflict("cannot kill container: %s: container %s is not running", c.id, c.id)
	}
	if err := process.Signal(sig); err != nil {
		if c.summaryState() != container.StateRunning {
			return conflict("cannot kill container: %s: container %s is not running", c.id, c.id)
		}
		return fmt.Errorf("signal container %s: %w", c.name, err)
	}
	if sig == syscall.SIGKILL {
		// A process that is dead has ended only when its output was taken: a client that does not read must not hold that up.
		time.AfterFunc(drainTimeout, func() {
			c.mu.Lock()
			same := c.process == process
			c.mu.Unlock()
			if same {
				c.streams.finish()
			}
		})
	}
	return nil
}

// drainTimeout is how long clients have to read the last output of a container that was killed, as in docker.
const drainTimeout = 2 * time.Second

// stop asks c's process to end and kills it when it has not within timeout (negative: never).
func (s *Server) stop(ctx context.Context, c *ctr, sig syscall.Signal, timeout time.Duration) error {
	c.mu.Lock()
	running, event, cancel := c.state == container.StateRunning, c.next, c.cancel
	c.mu.Unlock()
	if !running {
		return errNotModified
	}
	if err := c.signal(sig); err != nil {
		return err
	}
	var expired <-chan time.Time
	if timeout >= 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		expired = timer.C
	}
	select {
	case <-event.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-expired:
	}
	cancel(errors.New("the container did not stop in time"))
	select {
	case <-event.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
