// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/userns"
)

// containerNetwork is a network that is closed with the engine.
type containerNetwork interface {
	runc.Network
	Close() error
}

// openNetwork makes the network of containers: a bridge of the host, or, in a user namespace, one in this process.
func (e *Engine) openNetwork(opts Options) error {
	o := network.Options{Root: e.root, PoolSize: opts.NetworkPool, DNS: opts.DNS, Log: e.log}
	if userns.Inside() {
		n, err := network.NewUser(o)
		if err == nil {
			e.network = n
		}
		return err
	}
	n, err := network.New(o)
	if err == nil {
		e.network = n
	}
	return err
}
