// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/sshforward"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/metadata"
)

// acceptPause is how long an agent's socket waits after a connection that could not be accepted.
const acceptPause = 20 * time.Millisecond

// forwardAgent makes a socket below dir whose connections reach the client's ssh agent with that ID, until stop is called. It is ours and
// not BuildKit's sshforward.MountSSHSocket, which cannot have a long path and leaves a directory behind for each socket.
func forwardAgent(ctx context.Context, caller session.Caller, dir, id string) (socket string, stop func(), err error) {
	own, err := os.MkdirTemp(dir, "ssh-")
	if err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(own)
		}
	}()
	const name = "agent"
	listener, err := listenIn(own, name)
	if err != nil {
		return "", nil, err
	}
	if err := os.Chmod(filepath.Join(own, name), 0o600); err != nil {
		listener.Close()
		return "", nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var connections sync.WaitGroup
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				// Out of file descriptors, for instance: the next connection may find some.
				select {
				case <-time.After(acceptPause):
					continue
				case <-ctx.Done():
					return
				}
			}
			connections.Go(func() { copyAgent(ctx, caller, conn, id) })
		}
	})
	return filepath.Join(own, name), func() {
		listener.Close()
		cancel(fmt.Errorf("the step that uses the ssh agent %q has ended", id))
		connections.Wait()
		os.RemoveAll(own)
	}, nil
}

// copyAgent serves one connection.
func copyAgent(ctx context.Context, caller session.Caller, conn net.Conn, id string) {
	defer conn.Close()
	done := context.AfterFunc(ctx, func() { conn.Close() })
	defer done()
	ctx = metadata.NewOutgoingContext(caller.Context(ctx), metadata.Pairs(sshforward.KeySSHID, id))
	stream, err := sshforward.NewSSHClient(caller.Conn()).ForwardAgent(ctx)
	if err != nil {
		return // the step sees a connection that is closed
	}
	_ = sshforward.Copy(ctx, conn, stream, stream.CloseSend)
}

// listenIn binds a unix socket in a directory whose path may be longer than a socket's can be.
func listenIn(dir, name string) (net.Listener, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, name), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", filepath.Join(dir, name), err)
	}
	l.SetUnlinkOnClose(false) // by a path that will mean something else then
	return l, nil
}
