// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

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

// idMapFile, in the state directory of a user namespace's engine, says as whom the owners of its files are to be read.
const idMapFile = "id-map"

// checkIDs refuses a state directory in which owners mean others than here: layers would have files of nobody. IDs may be added.
func checkIDs(root string) error {
	now, err := userns.Map()
	if err != nil {
		return err
	}
	path := filepath.Join(root, idMapFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		if !userns.Inside() {
			return nil
		}
		return os.WriteFile(path, []byte(now), 0o600)
	}
	if err != nil {
		return err
	}
	switch before := string(b); {
	case before == now:
		return nil
	case userns.Inside() && userns.Extends(now, before):
		return os.WriteFile(path, []byte(now), 0o600)
	default:
		return fmt.Errorf("%s was made with other user and group IDs than there are now (then %s, now %s; %s): give the user those IDs again, or choose another directory (--root)",
			root, strconv.Quote(before), strconv.Quote(now), cmp.Or(userns.Describe(), "root of the host"))
	}
}

// user, networkKind and limits describe what this engine can give to containers, and why not more.
func (e *Engine) user() string { return cmp.Or(userns.Describe(), "root") }

func (e *Engine) networkKind() string {
	switch e.network.(type) {
	case *network.Network:
		return "bridge"
	case *network.User:
		return "user-mode (TCP, UDP and DNS over IPv4)"
	}
	return "host only (" + e.networkErr.Error() + ")"
}

func (e *Engine) limits() string {
	if reason := e.executor.NoLimits(); reason != "" {
		return "none (" + reason + ")"
	}
	if !userns.Inside() {
		return "cgroups"
	}
	return fmt.Sprintf("cgroups, with the controllers %q", e.executor.Controllers())
}
