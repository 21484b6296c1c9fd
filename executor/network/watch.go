// SPDX-License-Identifier: Apache-2.0

//go:build linux

package network

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// watch tells cheaply whether somebody may have taken the bridge or the tables away: the kernel reports each change of nftables to a
// socket, and whether an interface is there is one system call. Asking for the tables themselves would cost as much for each container
// as its network does otherwise. One goroutine at a time may use it.
type watch struct {
	tables int // a netlink socket that gets a message for every change of nftables
	links  int // any socket
	// again is set by whoever could not put right what was found: the next call says that there was a change.
	again bool
}

func newWatch() (_ *watch, err error) {
	w := &watch{tables: -1, links: -1}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.tables, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("watch nftables: %w", err)
	}
	if err := unix.Bind(w.tables, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}); err != nil {
		return nil, fmt.Errorf("watch nftables: %w", err)
	}
	if w.links, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	return w, nil
}

// changed says whether nftables were changed since the last call, by whomever, or the bridge has another index or is gone. When it
// cannot know, it says so too.
func (w *watch) changed(bridge string, index int) bool {
	changed := w.drain() || w.again
	w.again = false
	ifr, err := unix.NewIfreq(bridge)
	if err != nil {
		return true
	}
	if err := unix.IoctlIfreq(w.links, unix.SIOCGIFINDEX, ifr); err != nil {
		return true
	}
	return changed || int(ifr.Uint32()) != index
}

// drain takes all messages and says whether there were any. Ones that did not fit count.
func (w *watch) drain() bool {
	var buf [1]byte // what they say is of no interest
	some := false
	for {
		_, _, err := unix.Recvfrom(w.tables, buf[:], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return some
		case err == nil, errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
			some = true
		default:
			return true
		}
	}
}

func (w *watch) close() {
	for _, fd := range []int{w.tables, w.links} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}
