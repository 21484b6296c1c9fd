// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/config"
)

// openListeners listens at all addresses of conf, or at none.
func openListeners(ctx context.Context, conf config.GRPC) (_ []engine.Listener, err error) {
	var listeners []engine.Listener
	defer func() {
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
		}
	}()
	for _, address := range conf.Address {
		more, err := openListener(ctx, address, conf)
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, more)
	}
	if len(listeners) == 0 {
		return nil, errors.New("no address to listen at: give --addr unix://PATH")
	}
	return listeners, nil
}

func openListener(ctx context.Context, address string, conf config.GRPC) (engine.Listener, error) {
	switch scheme, rest, _ := strings.Cut(address, "://"); scheme {
	case "tcp":
		// Before the port is bound: nobody is to connect to what will not be served.
		tlsConf, err := serverTLS(address, conf.TLS)
		if err != nil {
			return engine.Listener{}, err
		}
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", rest)
		if err != nil {
			return engine.Listener{}, fmt.Errorf("listen at %s: %w", address, reason(err))
		}
		return engine.Listener{Listener: l, TLS: tlsConf}, nil
	case "fd":
		return inheritedListener(address, rest, conf)
	case "npipe":
		return engine.Listener{}, fmt.Errorf("listen at %s: npipe is for Windows", address)
	default:
		path, err := socketPath(address)
		if err != nil {
			return engine.Listener{}, err
		}
		l, err := listen(ctx, path, conf)
		return engine.Listener{Listener: l}, err
	}
}

// serverTLS reads the certificates for an address.
func serverTLS(address string, files config.TLS) (*tls.Config, error) {
	if files.Cert == "" || files.Key == "" || files.CA == "" {
		return nil, fmt.Errorf("listen at %s: TCP is only served with mutual TLS: give --tlscert, --tlskey and --tlscacert, or use unix://PATH", address)
	}
	conf, err := engine.ServerTLS(files.Cert, files.Key, files.CA)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", address, err)
	}
	return conf, nil
}

// inheritedListener is the first socket that systemd has opened for us.
func inheritedListener(address, which string, conf config.GRPC) (engine.Listener, error) {
	if which != "" {
		return engine.Listener{}, fmt.Errorf("listen at %s: a certain one of several sockets is not supported: use fd:// for the first", address)
	}
	sockets, err := activation.Listeners()
	if err != nil {
		return engine.Listener{}, fmt.Errorf("listen at %s: %w", address, err)
	}
	var first net.Listener
	for _, l := range sockets {
		switch {
		case l == nil:
		case first == nil:
			first = l
		default:
			l.Close()
		}
	}
	if first == nil {
		return engine.Listener{}, fmt.Errorf("listen at %s: systemd has given no socket: is the service started by its socket unit?", address)
	}
	out := engine.Listener{Listener: first, Borrowed: true}
	if first.Addr().Network() != "unix" {
		if out.TLS, err = serverTLS(address, conf.TLS); err != nil {
			first.Close()
			return engine.Listener{}, err
		}
	}
	return out, nil
}

// listen binds a unix socket. A file that an engine has left behind is replaced, one that is answered is not. The socket is
// its owner's alone, or also the group's when conf names one.
func listen(ctx context.Context, path string, conf config.GRPC) (*net.UnixListener, error) {
	shared := conf.UID != nil && *conf.UID != os.Geteuid() || conf.GID != nil && *conf.GID != os.Getegid()
	dirMode := os.FileMode(0o700)
	if shared {
		dirMode = 0o755
	}
	if filepath.Dir(path) == sharedRuntimeDir() {
		if err := privateDir(filepath.Dir(path)); err != nil {
			return nil, fmt.Errorf("listen at %s: %w", path, err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, pathReason(err))
	}
	if conn, err := unixDialer(path)(ctx); err == nil {
		conn.Close()
		return nil, fmt.Errorf("listen at %s: another engine listens there", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("listen at %s: %w", path, pathReason(err))
		}
	}
	// The socket must never be open to others, not even for the moment before a chmod.
	old := syscall.Umask(0o177)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, reason(err))
	}
	if conf.UID == nil && conf.GID == nil {
		return listener, nil
	}
	uid, gid := -1, -1
	if conf.UID != nil {
		uid = *conf.UID
	}
	if conf.GID != nil {
		gid = *conf.GID
	}
	// The owner first: the mode is for the right group only.
	err = os.Lchown(path, uid, gid)
	if err == nil {
		err = os.Chmod(path, 0o660)
	}
	if err != nil {
		listener.Close()
		return nil, fmt.Errorf("listen at %s: %w", path, pathReason(err))
	}
	return listener, nil
}

// groupID is the number of a group that is given by name or number.
func groupID(group string) (int, error) {
	if id, err := strconv.Atoi(group); err == nil {
		return id, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}

// notify tells systemd, when it has started us, how we are.
func notify(state string) {
	_, _ = daemon.SdNotify(false, state) // who has not asked is not told
}
