// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"sync"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	capspb "github.com/moby/buildkit/util/apicaps/pb"
)

// Frontends and clients ask for capabilities before they use them, so what is missing here must be listed: the lists
// name what BuildKit has and we do not. Everything else of BuildKit's lists is announced as supported.
var (
	missingLLB = map[apicaps.CapID]string{
		pb.CapSourceMetadataTransfer:    "metadata-only local sources",
		pb.CapSourceGitSignatureVerify:  "signatures of git sources",
		pb.CapSourceGitFetchByCommit:    "git sources that are fetched by commit only",
		pb.CapSourceGitBundle:           "git bundles",
		pb.CapSourceGitCheckoutBundle:   "git bundles",
		pb.CapSourceHTTPSignatureVerify: "signatures of HTTP sources",
		pb.CapBuildOpLLBFileName:        "build ops",
		pb.CapExecMetaNetworkProxy:      "a network proxy for steps",
		pb.CapRemoteCacheGHA:            "caches in GitHub Actions",
		pb.CapRemoteCacheAzBlob:         "caches in Azure",
		pb.CapSessionExporter:           "session exporters",
	}
	missingGateway = map[apicaps.CapID]string{}
)

// LLBCaps lists what the solver can do, in the form of the gateway protocol.
var LLBCaps = sync.OnceValue(func() []*capspb.APICap { return disable(pb.Caps.All(), missingLLB) })

// Caps lists what the gateway itself can do.
var Caps = sync.OnceValue(func() []*capspb.APICap { return disable(gwpb.Caps.All(), missingGateway) })

func gatewayCapSet() apicaps.CapSet { return gwpb.Caps.CapSet(Caps()) }

func disable(caps []*capspb.APICap, missing map[apicaps.CapID]string) []*capspb.APICap {
	for _, c := range caps {
		if what, ok := missing[apicaps.CapID(c.ID)]; ok {
			c.Enabled = false
			c.DisabledReasonMsg = "not supported yet: " + what
		}
	}
	return caps
}
