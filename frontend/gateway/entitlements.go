// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"fmt"

	"github.com/moby/buildkit/solver/pb"
)

var (
	errNetworkHost      = errors.New("network.host is not allowed: the build must be started with --allow network.host")
	errSecurityInsecure = errors.New("security.insecure is not allowed: the build must be started with --allow security.insecure")
)

// entitlements are the dangerous things that a client has allowed its build.
type entitlements struct {
	networkHost      bool
	securityInsecure bool
}

func parseEntitlements(names []string) (entitlements, error) {
	var e entitlements
	for _, name := range names {
		switch name {
		case "network.host":
			e.networkHost = true
		case "security.insecure":
			e.securityInsecure = true
		default:
			return e, fmt.Errorf("not supported yet: entitlement %q", name)
		}
	}
	return e, nil
}

// check refuses a definition with an exec that needs what the client has not allowed: the client says what it
// trusts its Dockerfile with.
func (e entitlements) check(def *pb.Definition) error {
	for _, data := range def.Def {
		var op pb.Op
		if err := op.UnmarshalVT(data); err != nil {
			return fmt.Errorf("load LLB: %w", err)
		}
		exec := op.GetExec()
		if exec == nil {
			continue
		}
		if exec.Network == pb.NetMode_HOST && !e.networkHost {
			return errNetworkHost
		}
		if exec.Security == pb.SecurityMode_INSECURE && !e.securityInsecure {
			return errSecurityInsecure
		}
	}
	return nil
}
