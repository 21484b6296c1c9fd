// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/solver/op"
)

var (
	errNetworkHost      = errors.New("network.host is not allowed: the build must be started with --allow network.host")
	errSecurityInsecure = errors.New("security.insecure is not allowed: the build must be started with --allow security.insecure")
)

// entitlements are the dangerous things that a client has allowed its build.
type entitlements struct {
	networkHost      bool
	securityInsecure bool
	// devices are the CDI devices that it may have, as they were named; allDevices is any.
	devices    []string
	allDevices bool
}

func parseEntitlements(names []string) (entitlements, error) {
	var e entitlements
	for _, name := range names {
		switch name {
		case "network.host":
			e.networkHost = true
		case "security.insecure":
			e.securityInsecure = true
		case "device":
			e.allDevices = true
		default:
			if text, ok := strings.CutPrefix(name, "device="); ok {
				device, options, _ := strings.Cut(text, ",")
				if options != "" {
					return e, fmt.Errorf("entitlement %q: not supported: %s (devices have the names that the host gives them)", name, options)
				}
				e.devices = append(e.devices, device)
				continue
			}
			return e, fmt.Errorf("not supported yet: entitlement %q", name)
		}
	}
	return e, nil
}

// check refuses a definition with an exec that needs what the client has not allowed: the client says what it
// trusts its Dockerfile with.
func (e entitlements) check(def *pb.Definition, devices op.Devices) error {
	for _, data := range def.Def {
		var vertex pb.Op
		if err := vertex.UnmarshalVT(data); err != nil {
			return fmt.Errorf("load LLB: %w", err)
		}
		exec := vertex.GetExec()
		if exec == nil {
			continue
		}
		if exec.Network == pb.NetMode_HOST && !e.networkHost {
			return errNetworkHost
		}
		if exec.Security == pb.SecurityMode_INSECURE && !e.securityInsecure {
			return errSecurityInsecure
		}
		if err := e.checkDevices(exec.CdiDevices, devices); err != nil {
			return err
		}
	}
	return nil
}

// checkDevices refuses devices that are there and that the client has not allowed. One that is not there is the step's own trouble.
func (e entitlements) checkDevices(wanted []*pb.CDIDevice, devices op.Devices) error {
	if len(wanted) == 0 || e.allDevices || devices == nil {
		return nil
	}
	granted := map[string]bool{}
	for _, name := range e.devices {
		found, err := devices.Find(name)
		if err != nil {
			return err
		}
		for _, d := range found {
			granted[d.Name] = true
		}
	}
	for _, w := range wanted {
		found, err := devices.Find(w.GetName())
		if err != nil {
			return err
		}
		for _, d := range found {
			if !d.AutoAllowed && !granted[d.Name] {
				return fmt.Errorf("device %s is not allowed: the build must be started with --allow device=%s", d.Name, d.Name)
			}
		}
	}
	return nil
}
