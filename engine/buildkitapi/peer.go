// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/seed-68981b69/slipway/executor/userns"
)

// PeerCredentials are transport credentials for connections over unix sockets: nothing is encrypted, and what the kernel
// knows about the peer is there for the handlers.
func PeerCredentials() credentials.TransportCredentials { return peerCredentials{} }

type peerCredentials struct{}

// peerInfo is who is at the other end of a connection.
type peerInfo struct {
	credentials.CommonAuthInfo
	uid   uint32
	known bool
}

func (peerInfo) AuthType() string { return "unix-peer" }

func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}
	if uid, err := PeerUID(conn); err == nil {
		info.uid, info.known = uid, true
	}
	return conn, info, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("peer credentials are for servers")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "insecure"}
}

func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

func (peerCredentials) OverrideServerName(string) error { return nil }

// PeerUID returns the user at the other end of a unix socket.
func PeerUID(conn net.Conn) (uint32, error) {
	if network := conn.LocalAddr().Network(); network != "unix" {
		return 0, fmt.Errorf("peer of a %s connection: only unix sockets know it", network)
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("peer of a %T: not a socket", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

// samePeerUser reports whether the caller of an RPC is the user that the engine runs as.
func samePeerUser(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	info, ok := p.AuthInfo.(peerInfo)
	return ok && info.known && info.uid == uint32(os.Geteuid())
}

// HostID names the file system that paths of this process refer to: the running kernel, the mount namespace and the
// root directory. A client that sends it with a path is understood only by an engine that sees the same files;
// a socket that was mounted into a container or forwarded from another host does not fool it.
func HostID() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	namespace, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return "", err
	}
	if s := userns.Started(); s != nil {
		namespace = s.MountNamespace // ours is a copy of it, into which later mounts come too
	}
	var root unix.Stat_t
	if err := unix.Stat("/", &root); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s %d:%d", strings.TrimSpace(string(boot)), namespace, root.Dev, root.Ino), nil
}
