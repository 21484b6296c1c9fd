// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor/runc/wire"
)

// runner is a running slipway-runner, seen from the engine.
type runner struct {
	path string
	pid  int
	conn *net.UnixConn
	log  *slog.Logger
	done chan struct{} // closed when the runner has ended; err is set then

	mu     sync.Mutex // guards events and err
	events map[string]chan wire.Event
	err    error
}

// A runner waits: for libcontainer's children, for what they say, for their ends. The monitor of Go's runtime sleeps for 20 µs at a time,
// again and again, as long as something waits in a system call; with the kernel's own timer slack, 50 µs, it used a quarter of a step's
// processor time. So the kernel may wake a runner's threads later by runnerTimerSlack, in nanoseconds, and there are more of Go's
// processors than could wait at once before the monitor takes one of them back. A container gets the kernel's slack before its command begins.
const (
	runnerTimerSlack = 5_000_000
	runnerProcs      = "GOMAXPROCS=6"
)

// startRunner starts the binary at path.
func startRunner(path string, log *slog.Logger) (*runner, error) {
	conn, theirs, err := wire.Pair()
	if err != nil {
		return nil, err
	}
	stderr, stderrW, err := os.Pipe()
	if err != nil {
		conn.Close()
		theirs.Close()
		return nil, err
	}
	cmd := &exec.Cmd{
		Path:       path,
		Args:       []string{"slipway-runner"},
		Env:        []string{runnerProcs},
		Dir:        "/",
		Stderr:     stderrW,
		ExtraFiles: []*os.File{theirs},
		// Its own session: the terminal's Ctrl-C is not for it. The closed socket tells it that we have gone; the
		// signal is for the case that a child of ours still holds the socket open.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGTERM},
	}
	r := &runner{path: path, conn: conn, log: log, done: make(chan struct{}), events: map[string]chan wire.Event{}}
	started := make(chan error, 1)
	exited := make(chan error, 1)
	go func() {
		// The parent-death signal belongs to the thread that started the child, so that thread has to stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, runnerTimerSlack, 0, 0, 0) // the child inherits it
		err := cmd.Start()
		started <- err
		if err == nil {
			exited <- cmd.Wait()
		}
	}()
	err = <-started
	theirs.Close()
	stderrW.Close()
	if err != nil {
		conn.Close()
		stderr.Close()
		return nil, fmt.Errorf("start runner: %w", err)
	}
	r.pid = cmd.Process.Pid
	last := make(chan string, 1)
	go func() { last <- r.forwardLog(stderr) }()
	go func() {
		err := r.receive()
		conn.Close()
		if exitErr := <-exited; exitErr != nil {
			err = exitErr
		}
		if text := <-last; text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		r.end(fmt.Errorf("slipway-runner ended: %w", err))
	}()
	return r, nil
}

// forwardLog hands the runner's messages to the log and returns the last ones.
func (r *runner) forwardLog(stderr *os.File) string {
	defer stderr.Close()
	var last []string
	sc := bufio.NewScanner(stderr)
	for sc.Scan() {
		r.log.Debug("runner", "message", sc.Text())
		if last = append(last, sc.Text()); len(last) > 10 {
			last = last[1:]
		}
	}
	return strings.Join(last, "\n")
}

// receive hands events to their containers until the runner has gone.
func (r *runner) receive() error {
	for {
		var ev wire.Event
		files, err := wire.Receive(r.conn, &ev)
		if err != nil {
			return err
		}
		for _, f := range files {
			f.Close()
		}
		r.mu.Lock()
		ch := r.events[ev.ID]
		if ev.Kind != wire.Started {
			delete(r.events, ev.ID)
		}
		r.mu.Unlock()
		if ch != nil {
			ch <- ev // has room for all the events of a container
		}
	}
}

// end tells everybody who waits that the runner has gone.
func (r *runner) end(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	for id, ch := range r.events {
		delete(r.events, id)
		close(ch)
	}
	close(r.done)
}

// start asks for a container and returns where its events arrive. The channel is closed early when the runner ends.
func (r *runner) start(req wire.Request, files ...*os.File) (<-chan wire.Event, error) {
	ch := make(chan wire.Event, 2)
	r.mu.Lock()
	if r.err != nil {
		r.mu.Unlock()
		return nil, r.err
	}
	if _, exists := r.events[req.ID]; exists {
		r.mu.Unlock()
		return nil, fmt.Errorf("container %q exists already", req.ID)
	}
	r.events[req.ID] = ch
	r.mu.Unlock()
	if err := wire.Send(r.conn, req, files...); err != nil {
		r.mu.Lock()
		delete(r.events, req.ID)
		r.mu.Unlock()
		return nil, fmt.Errorf("runner: %w", err)
	}
	return ch, nil
}

// tell sends a request that has no answer.
func (r *runner) tell(req wire.Request) error {
	if err := wire.Send(r.conn, req); err != nil {
		return fmt.Errorf("runner: %w", err)
	}
	return nil
}

// stop lets the runner kill and remove all its containers and waits for it to end.
func (r *runner) stop() error {
	_ = r.conn.CloseWrite()
	<-r.done
	if errors.Is(r.err, io.EOF) {
		return nil
	}
	return r.err
}
