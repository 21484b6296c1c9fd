// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Status is what becomes of a key.
type Status string

// What becomes of a key.
const (
	Done     Status = "done"
	Refused  Status = "refused"   // unless its value asks for nothing
	NoEffect Status = "no effect" // with a warning
)

// Key is one key of the file.
type Key struct {
	// Path is its name with the tables around it; * stands for any name.
	Path   string
	Status Status
	// Why says what is there instead, for keys that are not done.
	Why string
	// fine are values that ask for nothing, for keys that are refused. Empty ones always do, and false where fine is empty.
	fine []any
}

// Keys are all keys of buildkitd.toml. A test compares them with BuildKit's own.
var Keys = []Key{
	{Path: "debug", Status: Done},
	{Path: "trace", Status: Done},
	{Path: "root", Status: Done},
	{Path: "insecure-entitlements", Status: Done},
	{Path: "proxyNetwork", Status: Refused, Why: "steps have a bridge with NAT and no proxy that records what they fetch"},
	{Path: "provenanceEnvDir", Status: Done},

	{Path: "log.format", Status: Done},
	{Path: "log.level", Status: Done},

	{Path: "grpc.address", Status: Done},
	{Path: "grpc.debugAddress", Status: Done},
	{Path: "grpc.uid", Status: Done},
	{Path: "grpc.gid", Status: Done},
	{Path: "grpc.securityDescriptor", Status: Refused, Why: "it is for Windows"},
	{Path: "grpc.tls.cert", Status: Done},
	{Path: "grpc.tls.key", Status: Done},
	{Path: "grpc.tls.ca", Status: Done},

	{Path: "otel.socketPath", Status: Done},

	{Path: "cdi.disabled", Status: Done},
	{Path: "cdi.specDirs", Status: Done},
	{Path: "cdi.autoAllowed", Status: Done},

	{Path: "worker.oci.enabled", Status: Refused, Why: "there is no other worker", fine: []any{true}},
	{Path: "worker.oci.labels.*", Status: Done},
	{Path: "worker.oci.platforms", Status: Done},
	{Path: "worker.oci.snapshotter", Status: Refused, Why: "layers are mounted with overlayfs", fine: []any{"auto", "overlayfs"}},
	{Path: "worker.oci.rootless", Status: Done, Why: "the engine sees by itself how it runs; true for root of the host is refused"},
	{Path: "worker.oci.noProcessSandbox", Status: Refused, Why: "steps always have their own PID namespace"},
	{Path: "worker.oci.gc", Status: Done},
	{Path: "worker.oci.gckeepstorage", Status: Done},
	{Path: "worker.oci.reservedSpace", Status: Done},
	{Path: "worker.oci.maxUsedSpace", Status: Done},
	{Path: "worker.oci.minFreeSpace", Status: Done},
	{Path: "worker.oci.gcpolicy.all", Status: Done},
	{Path: "worker.oci.gcpolicy.filters", Status: Done},
	{Path: "worker.oci.gcpolicy.keepDuration", Status: Done},
	{Path: "worker.oci.gcpolicy.keepBytes", Status: Done},
	{Path: "worker.oci.gcpolicy.reservedSpace", Status: Done},
	{Path: "worker.oci.gcpolicy.maxUsedSpace", Status: Done},
	{Path: "worker.oci.gcpolicy.minFreeSpace", Status: Done},
	{Path: "worker.oci.networkMode", Status: Done, Why: "auto is bridge; cni is refused"},
	{Path: "worker.oci.cniConfigPath", Status: Refused, Why: "CNI plugins are not used", fine: []any{"/etc/buildkit/cni.json"}},
	{Path: "worker.oci.cniBinaryPath", Status: Refused, Why: "CNI plugins are not used", fine: []any{"/opt/cni/bin"}},
	{Path: "worker.oci.cniPoolSize", Status: Done, Why: "network namespaces that are kept for the next steps"},
	{Path: "worker.oci.bridgeName", Status: Refused, Why: "the bridge is named after the state directory", fine: []any{"buildkit0"}},
	{Path: "worker.oci.bridgeSubnet", Status: Refused, Why: "a free subnet is looked for", fine: []any{"10.10.0.0/16"}},
	{Path: "worker.oci.userRemapUnsupported", Status: Refused, Why: "users are not mapped"},
	{Path: "worker.oci.binary", Status: Refused, Why: "containers are run by libcontainer, without another program", fine: []any{"runc", "buildkit-runc"}},
	{Path: "worker.oci.proxySnapshotterPath", Status: Refused, Why: "layers are mounted with overlayfs"},
	{Path: "worker.oci.defaultCgroupParent", Status: Done},
	{Path: "worker.oci.stargzSnapshotter.*", Status: Refused, Why: "layers are pulled whole"},
	{Path: "worker.oci.apparmor-profile", Status: Refused, Why: "containers have no AppArmor profile"},
	{Path: "worker.oci.selinux", Status: Refused, Why: "containers have no SELinux label"},
	{Path: "worker.oci.max-parallelism", Status: Done},

	{Path: "worker.containerd.enabled", Status: Refused, Why: "the engine does not use containerd"},

	{Path: "registry.*.mirrors", Status: Done},
	{Path: "registry.*.http", Status: Done},
	{Path: "registry.*.insecure", Status: Done},
	{Path: "registry.*.ca", Status: Done},
	{Path: "registry.*.keypair.key", Status: Done},
	{Path: "registry.*.keypair.cert", Status: Done},
	{Path: "registry.*.tlsconfigdir", Status: Done},

	{Path: "dns.nameservers", Status: Done},
	{Path: "dns.options", Status: Done},
	{Path: "dns.searchDomains", Status: Done},

	{Path: "history.maxAge", Status: Done},
	{Path: "history.maxEntries", Status: Done},

	{Path: "frontend.dockerfile.v0.enabled", Status: Done},
	{Path: "frontend.gateway.v0.enabled", Status: Done},
	{Path: "frontend.gateway.v0.allowedRepositories", Status: Done},

	{Path: "system.platformsCacheMaxAge", Status: NoEffect, Why: "platforms are looked up each time"},
	{Path: "system.maxRegistryConcurrency", Status: Done},
	{Path: "system.sessionAuthTimeout", Status: Done},

	{Path: "cache.gha.*", Status: Refused, Why: "the cache of GitHub Actions is not supported yet"},

	{Path: "compaction.*", Status: NoEffect, Why: "the engine's database tidies itself up"},
}

// OwnKeys are keys that BuildKit does not have; a buildkitd ignores them.
var OwnKeys = []Key{
	{Path: "slipway.extraCA", Status: Done},
}

// containerdKeys begin with this and mean nothing while that worker is not enabled.
const containerdKeys = "worker.containerd."

// find returns the entry of a path, nil when there is none. As in BuildKit, case does not matter.
func find(path []string) *Key {
	for _, keys := range [][]Key{Keys, OwnKeys} {
		for i := range keys {
			if match(strings.Split(keys[i].Path, "."), path) {
				return &keys[i]
			}
		}
	}
	return nil
}

// match compares names; the last * of a pattern stands for any number of them, another for one, which may have dots.
func match(pattern, path []string) bool {
	// A frontend's name has a dot in it.
	flat := strings.Split(strings.Join(path, "."), ".")
	switch {
	case pattern[0] == "frontend":
		path = flat
	case pattern[len(pattern)-1] == "*":
		n := len(pattern) - 1
		if len(path) <= n {
			return false
		}
		pattern, path = pattern[:n], path[:n]
	}
	return slices.EqualFunc(pattern, path, func(p, s string) bool { return p == "*" || strings.EqualFold(p, s) })
}

// check looks at every key of a file: it returns what to warn of, and an error that names all keys that are refused.
func check(tree map[string]any) (warnings []string, err error) {
	var refused []error
	walk(nil, tree, func(path []string, value any) {
		name := strings.Join(path, ".")
		key := find(path)
		switch {
		case key == nil && strings.HasPrefix(strings.ToLower(name), containerdKeys):
			warnings = append(warnings, fmt.Sprintf("%s has no effect: the engine does not use containerd", name))
		case key == nil:
			warnings = append(warnings, fmt.Sprintf("unknown key %s", name))
		case key.Status == NoEffect:
			warnings = append(warnings, fmt.Sprintf("%s has no effect: %s", name, key.Why))
		case key.Status == Refused && !key.allows(value):
			refused = append(refused, fmt.Errorf("%s = %v is not supported: %s", name, value, key.Why))
		}
	})
	return warnings, errors.Join(refused...)
}

// Check refuses a value for a key that asks for what is not supported.
func Check(path string, value any) error {
	key := find(strings.Split(path, "."))
	if key == nil || key.Status == Refused && !key.allows(value) {
		why := "there is no such key"
		if key != nil {
			why = key.Why
		}
		return fmt.Errorf("%v is not supported: %s", value, why)
	}
	return nil
}

// allows says whether value asks for nothing.
func (k *Key) allows(value any) bool {
	switch v := value.(type) {
	case bool:
		if !v && len(k.fine) == 0 {
			return true
		}
	case string:
		if v == "" {
			return true
		}
	case int64:
		if v == 0 {
			return true
		}
	case []any:
		return len(v) == 0
	}
	return slices.Contains(k.fine, value)
}

// walk calls fn for every value that is no table, in the order of their names.
func walk(path []string, value any, fn func(path []string, value any)) {
	switch v := value.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			walk(append(path[:len(path):len(path)], name), v[name], fn)
		}
	case []any:
		tables := 0
		for _, item := range v {
			if _, ok := item.(map[string]any); ok {
				tables++
				walk(path, item, fn)
			}
		}
		if tables == 0 {
			fn(path, value)
		}
	default:
		fn(path, value)
	}
}
