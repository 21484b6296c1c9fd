// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/docker/go-units"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/sys/signal"

	"github.com/seed-68981b69/slipway/executor"
)

// mergeConfig fills in what user leaves to the image, by docker's rules. user is changed.
func mergeConfig(user *container.Config, img dockerspec.DockerOCIImageConfig) error {
	if user.User == "" {
		user.User = img.User
	}
	for text := range img.ExposedPorts {
		port, err := network.ParsePort(text)
		if err != nil {
			return fmt.Errorf("the image exposes %q: %w", text, err)
		}
		if user.ExposedPorts == nil {
			user.ExposedPorts = network.PortSet{}
		}
		user.ExposedPorts[port] = struct{}{}
	}
	user.Env = mergeEnv(img.Env, user.Env)
	if len(img.Labels) > 0 {
		labels := map[string]string{}
		for k, v := range img.Labels {
			labels[k] = v
		}
		for k, v := range user.Labels {
			labels[k] = v
		}
		user.Labels = labels
	}
	if len(user.Entrypoint) == 0 {
		if len(user.Cmd) == 0 {
			user.Cmd = img.Cmd
		}
		user.Entrypoint = img.Entrypoint
	}
	if len(user.Entrypoint) == 1 && user.Entrypoint[0] == "" { // how a client says: none
		user.Entrypoint = nil
	}
	if user.WorkingDir == "" {
		user.WorkingDir = img.WorkingDir
	}
	if user.WorkingDir == "" {
		user.WorkingDir = "/"
	}
	if user.StopSignal == "" {
		user.StopSignal = img.StopSignal
	}
	if len(user.Shell) == 0 {
		user.Shell = img.Shell
	}
	for target := range img.Volumes {
		if user.Volumes == nil {
			user.Volumes = map[string]struct{}{}
		}
		user.Volumes[target] = struct{}{}
	}
	return nil
}

// mergeEnv puts over on top of base, variable by variable, in order. A name without "=" takes the variable away.
func mergeEnv(base, over []string) []string {
	var out []string
	at := map[string]int{}
	for _, kv := range append(slices.Clone(base), over...) {
		name, _, set := strings.Cut(kv, "=")
		i, known := at[name]
		switch {
		case !set && known:
			out[i] = ""
			delete(at, name)
		case !set:
		case known:
			out[i] = kv
		default:
			at[name] = len(out)
			out = append(out, kv)
		}
	}
	return slices.DeleteFunc(out, func(kv string) bool { return kv == "" })
}

// refuseConfig names what of c is not done.
func refuseConfig(c container.Config) error {
	for name := range c.Volumes {
		if !path.IsAbs(name) {
			return invalid("invalid volume %q: want an absolute path in the container", name)
		}
	}
	if h := c.Healthcheck; h != nil && len(h.Test) > 0 && h.Test[0] != "NONE" {
		return unsupported("Config.Healthcheck")
	}
	c.Healthcheck = nil
	return refuseSet("Config", c,
		"Hostname", "User", "AttachStdin", "AttachStdout", "AttachStderr", "ExposedPorts", "Tty", "OpenStdin", "StdinOnce", "Env",
		"Cmd", "Image", "Volumes", "WorkingDir", "Entrypoint", "OnBuild", "Labels", "StopSignal", "StopTimeout", "Shell")
}

// refuseHost names what of h is not done, and what is wrong in it.
func refuseHost(h container.HostConfig) error {
	value := func(ok bool, name, got string) error {
		if ok {
			return nil
		}
		return unsupported(fmt.Sprintf("HostConfig.%s %q", name, got))
	}
	for _, err := range []error{
		value(h.LogConfig.Type == "" || h.LogConfig.Type == "none", "LogConfig.Type", h.LogConfig.Type),
		value(len(h.LogConfig.Config) == 0, "LogConfig.Config", fmt.Sprint(h.LogConfig.Config)),
		value(h.RestartPolicy.IsNone(), "RestartPolicy", string(h.RestartPolicy.Name)),
		value(h.VolumeDriver == "" || h.VolumeDriver == "local", "VolumeDriver", h.VolumeDriver),
		value(h.CgroupnsMode == "" || h.CgroupnsMode == "private", "CgroupnsMode", string(h.CgroupnsMode)),
		value(h.IpcMode == "" || h.IpcMode == "private", "IpcMode", string(h.IpcMode)),
		value(h.UsernsMode == "" || h.UsernsMode == "host", "UsernsMode", string(h.UsernsMode)),
		value(h.Runtime == "" || h.Runtime == "slipway", "Runtime", h.Runtime),
		value(h.Isolation.IsDefault(), "Isolation", string(h.Isolation)),
		value(h.MemorySwappiness == nil || *h.MemorySwappiness == -1, "MemorySwappiness", text(h.MemorySwappiness)),
		value(h.MaskedPaths == nil, "MaskedPaths", fmt.Sprint(h.MaskedPaths)), // an empty list masks nothing
		value(h.ReadonlyPaths == nil, "ReadonlyPaths", fmt.Sprint(h.ReadonlyPaths)),
		value(h.OomKillDisable == nil || !*h.OomKillDisable, "OomKillDisable", "true"),
	} {
		if err != nil {
			return err
		}
	}
	return refuseSet("HostConfig", h,
		"Binds", "ContainerIDFile", "LogConfig", "NetworkMode", "PortBindings", "RestartPolicy", "AutoRemove", "VolumeDriver", "ConsoleSize",
		"CapAdd", "CapDrop", "CgroupnsMode", "ExtraHosts", "GroupAdd", "IpcMode", "Privileged", "PublishAllPorts", "ReadonlyRootfs", "SecurityOpt",
		"Tmpfs", "UsernsMode", "ShmSize", "Runtime", "Isolation", "Mounts", "Init",
		"CPUShares", "Memory", "NanoCPUs", "CgroupParent", "CPUPeriod", "CPUQuota", "CpusetCpus", "CpusetMems", "MemorySwap", "MemorySwappiness",
		"OomKillDisable", "PidsLimit", "Ulimits", "DNS", "DNSOptions", "DNSSearch")
}

func text(p *int64) string {
	if p == nil {
		return ""
	}
	return strconv.FormatInt(*p, 10)
}

// refuseSet fails at the first field of the struct v that is set and not in done, so that a field which a later version of
// the API adds is refused until somebody has thought of it. Embedded structs count as part of v.
func refuseSet(prefix string, v any, done ...string) error {
	rv := reflect.ValueOf(v)
	for i := range rv.NumField() {
		field, value := rv.Type().Field(i), rv.Field(i)
		if field.Anonymous {
			if err := refuseSet(prefix, value.Interface(), done...); err != nil {
				return err
			}
			continue
		}
		if slices.Contains(done, field.Name) || isUnset(value) {
			continue
		}
		return unsupported(prefix + "." + field.Name)
	}
	return nil
}

// isUnset tells the zero value; an empty list or map counts as not set.
func isUnset(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Slice, reflect.Map:
		return v.Len() == 0
	}
	return v.IsZero()
}

// refuseNetworking names what of n is not done. Clients send an empty entry for the network that NetworkMode names.
func refuseNetworking(n *network.NetworkingConfig) error {
	if n == nil {
		return nil
	}
	for name, e := range n.EndpointsConfig {
		switch name {
		case "default", "bridge", "host", "none":
		default:
			return notFound("network %s not found (not supported yet: networks other than bridge, host and none)", name)
		}
		if e == nil {
			continue
		}
		if err := refuseSet("EndpointsConfig["+name+"]", *e); err != nil {
			return err
		}
	}
	return nil
}

// plan is what a request for a container amounts to.
type plan struct {
	// spec lacks ID, Rootfs, User, Hostname and the mounts of volumes, which the container brings.
	spec     executor.Spec
	mounts   []plannedMount // in the order in which they are made
	groups   []string       // GroupAdd
	warnings []string
}

// plannedMount is one mount of a container before it is looked at on the host.
type plannedMount struct {
	kind     mount.Type
	source   string // host path, or the name of a volume ("" for an anonymous one)
	target   string
	readonly bool
	// create makes a missing bind source, as -v does and --mount does not.
	create    bool
	recursive bool
	copyUp    bool // a new volume starts with what the image has at target
	size      int64
	mode      uint32
	exec      bool   // a tmpfs whose files may be executed, which docker allows only when it is asked
	optional  string // the text of the options, for inspect
}

// planContainer checks a request whose config has been merged with the image's and works out what it means. It does not look
// at the host.
func planContainer(c *container.Config, h *container.HostConfig) (*plan, error) {
	if err := refuseHost(*h); err != nil {
		return nil, err
	}
	p := &plan{groups: h.GroupAdd}
	p.spec = executor.Spec{
		ReadonlyRootfs: h.ReadonlyRootfs,
		Args:           append(slices.Clone(c.Entrypoint), c.Cmd...),
		Cwd:            c.WorkingDir,
		Terminal:       c.Tty,
		Rows:           uint16(min(h.ConsoleSize[0], math.MaxUint16)),
		Cols:           uint16(min(h.ConsoleSize[1], math.MaxUint16)),
		Privileged:     h.Privileged,
		ShmSize:        h.ShmSize,
		CgroupParent:   strings.TrimPrefix(h.CgroupParent, "/"),
		Init:           h.Init != nil && *h.Init,
	}
	if len(p.spec.Args) == 0 || p.spec.Args[0] == "" {
		return nil, invalid("no command specified: the image has neither ENTRYPOINT nor CMD")
	}
	if !path.IsAbs(p.spec.Cwd) {
		return nil, invalid("the working directory '%s' is invalid, it needs to be an absolute path", p.spec.Cwd)
	}
	p.spec.Cwd = path.Clean(p.spec.Cwd)
	if h.ShmSize < 0 {
		return nil, invalid("SHM size can not be less than 0")
	}
	if c.StopSignal != "" {
		sig, err := signal.ParseSignal(c.StopSignal)
		if err != nil {
			return nil, invalid("%v", err)
		}
		p.spec.StopSignal = sig
	}
	for _, step := range []func(*container.Config, *container.HostConfig) error{
		p.planNetwork, p.planSecurity, p.planResources, p.planMounts,
	} {
		if err := step(c, h); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *plan) planNetwork(c *container.Config, h *container.HostConfig) error {
	switch h.NetworkMode {
	case "", "default", "bridge":
		p.spec.Network = executor.NetworkBridge
	case "host":
		p.spec.Network = executor.NetworkHost
	case "none":
		p.spec.Network = executor.NetworkNone
	default:
		if h.NetworkMode.IsContainer() {
			return unsupported("HostConfig.NetworkMode " + strconv.Quote(string(h.NetworkMode)))
		}
		return notFound("network %s not found (not supported yet: networks other than bridge, host and none)", h.NetworkMode)
	}
	for _, entry := range h.ExtraHosts {
		host, ip, ok := strings.Cut(entry, ":")
		if other, ip2, isNew := strings.Cut(entry, "="); isNew {
			host, ip, ok = other, ip2, true
		}
		ip = strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
		_, err := netip.ParseAddr(ip)
		if ip == executor.HostGateway && p.spec.Network != executor.NetworkNone {
			err = nil
		}
		if !ok || host == "" || err != nil {
			return invalid("invalid extra host %q: want HOST:IP", entry)
		}
		p.spec.ExtraHosts = append(p.spec.ExtraHosts, executor.HostEntry{Host: host, IP: ip})
	}
	for _, server := range h.DNS {
		p.spec.Nameservers = append(p.spec.Nameservers, server.String())
	}
	for _, list := range [][]string{h.DNSSearch, h.DNSOptions} {
		for _, word := range list {
			if word == "" || strings.ContainsAny(word, " \t\r\n") {
				return invalid("invalid DNS search domain or option %q", word)
			}
		}
	}
	p.spec.DNSSearch, p.spec.DNSOptions = h.DNSSearch, h.DNSOptions
	ports, err := publishedPorts(c, h)
	if err != nil {
		return err
	}
	if len(ports) > 0 && p.spec.Network != executor.NetworkBridge {
		p.warnings = append(p.warnings, fmt.Sprintf("Published ports are discarded when using %s network mode", h.NetworkMode))
		ports = nil
	}
	p.spec.Ports = ports
	return nil
}

// publishedPorts lists what PortBindings and PublishAllPorts ask for, in order of the container's port.
func publishedPorts(c *container.Config, h *container.HostConfig) ([]executor.Port, error) {
	var out []executor.Port
	ask := func(port network.Port, b network.PortBinding) error {
		if proto := port.Proto(); proto != network.TCP && proto != network.UDP {
			return unsupported(fmt.Sprintf("publishing port %s (tcp and udp are)", port))
		}
		p := executor.Port{ContainerPort: port.Num(), Protocol: string(port.Proto())}
		if p.ContainerPort == 0 {
			return invalid("invalid container port %s", port)
		}
		if b.HostIP.IsValid() {
			p.HostIP = b.HostIP.String()
		}
		if b.HostPort != "" {
			ports, err := network.ParsePortRange(b.HostPort)
			if err != nil || strings.Contains(b.HostPort, "/") {
				return invalid("invalid port specification: %q", b.HostPort)
			}
			p.HostPort = ports.Start()
			if ports.End() != ports.Start() {
				p.HostPortEnd = ports.End()
			}
			if p.HostPort == 0 && p.HostPortEnd != 0 {
				return invalid("invalid port specification: %q", b.HostPort)
			}
		}
		out = append(out, p)
		return nil
	}
	for port, bindings := range h.PortBindings {
		if len(bindings) == 0 {
			bindings = []network.PortBinding{{}}
		}
		for _, b := range bindings {
			if err := ask(port, b); err != nil {
				return nil, err
			}
		}
	}
	if h.PublishAllPorts {
		for port := range c.ExposedPorts {
			if _, bound := h.PortBindings[port]; !bound {
				if err := ask(port, network.PortBinding{}); err != nil {
					return nil, err
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b executor.Port) int {
		return strings.Compare(fmt.Sprintf("%05d/%s %s %05d", a.ContainerPort, a.Protocol, a.HostIP, a.HostPort),
			fmt.Sprintf("%05d/%s %s %05d", b.ContainerPort, b.Protocol, b.HostIP, b.HostPort))
	})
	return out, nil
}

func (p *plan) planSecurity(_ *container.Config, h *container.HostConfig) error {
	for _, option := range h.SecurityOpt {
		if err := p.securityOption(option); err != nil {
			return err
		}
	}
	var err error
	if p.spec.CapAdd, err = capabilities(h.CapAdd); err != nil {
		return err
	}
	p.spec.CapDrop, err = capabilities(h.CapDrop)
	return err
}

// securityOption reads NAME=VALUE, or NAME:VALUE as it once was. Of several options of one name the last counts.
func (p *plan) securityOption(option string) error {
	if option == "no-new-privileges" {
		p.spec.NoNewPrivileges = true
		return nil
	}
	name, value, ok := strings.Cut(option, "=")
	if !ok {
		name, value, ok = strings.Cut(option, ":")
	}
	switch {
	case !ok:
		return invalid("invalid security option %q: want NAME=VALUE", option)
	case name == "seccomp":
		p.spec.SeccompUnconfined, p.spec.SeccompProfile = value == "unconfined", ""
		if value == "unconfined" || value == "builtin" {
			return nil
		}
		if !strings.HasPrefix(strings.TrimSpace(value), "{") || !json.Valid([]byte(value)) {
			return invalid("invalid security option: seccomp wants unconfined, builtin, or a profile in JSON (clients send the content of a file)")
		}
		p.spec.SeccompProfile = value
	case name == "apparmor" && value == "unconfined", name == "label" && value == "disable":
		// It is so.
	case name == "no-new-privileges":
		on, err := strconv.ParseBool(value)
		if err != nil {
			return invalid("invalid security option %q", option)
		}
		p.spec.NoNewPrivileges = on
	case slices.Contains([]string{"apparmor", "label", "systempaths", "writable-cgroups"}, name):
		return unsupported("HostConfig.SecurityOpt " + strconv.Quote(option))
	default:
		return invalid("invalid security option %q", option)
	}
	return nil
}

// capabilities writes names in the executor's form.
func capabilities(names []string) ([]string, error) {
	var out []string
	for _, name := range names {
		upper := strings.ToUpper(name)
		if upper != "ALL" && !strings.HasPrefix(upper, "CAP_") {
			upper = "CAP_" + upper
		}
		if upper != "ALL" && !slices.Contains(knownCapabilities, upper) {
			return nil, invalid("invalid capability: %q", name)
		}
		out = append(out, upper)
	}
	return out, nil
}

// knownCapabilities is capabilities(7).
var knownCapabilities = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP
	CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE
	CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME
	CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG
	CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)

// minMemory is docker's lower bound for a memory limit: less cannot start a process.
const minMemory = 6 << 20

func (p *plan) planResources(_ *container.Config, h *container.HostConfig) error {
	r := &p.spec.Resources
	if h.Memory != 0 && h.Memory < minMemory {
		return invalid("Minimum memory limit allowed is 6MB")
	}
	if h.MemorySwap > 0 && (h.Memory == 0 || h.MemorySwap < h.Memory) {
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	}
	r.MemoryBytes, r.MemorySwapBytes = h.Memory, h.MemorySwap
	if h.CPUShares < 0 || h.CPUPeriod < 0 || h.NanoCPUs < 0 {
		return invalid("CPU shares, period and number cannot be negative")
	}
	r.CPUShares, r.CPUPeriod, r.CPUQuota = uint64(h.CPUShares), uint64(h.CPUPeriod), h.CPUQuota
	if h.NanoCPUs > 0 {
		if h.CPUPeriod > 0 || h.CPUQuota > 0 {
			return invalid("Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set")
		}
		r.CPUPeriod = 100_000 // µs, the kernel's default
		r.CPUQuota = max(1000, int64(math.Round(float64(h.NanoCPUs)/1e9*float64(r.CPUPeriod))))
	}
	r.CpusetCpus, r.CpusetMems = h.CpusetCpus, h.CpusetMems
	if h.PidsLimit != nil && *h.PidsLimit > 0 {
		r.PidsLimit = *h.PidsLimit
	}
	for _, u := range h.Ulimits {
		limit := func(n int64) uint64 {
			if n == -1 {
				return math.MaxUint64
			}
			return uint64(n)
		}
		p.spec.Ulimits = append(p.spec.Ulimits, executor.Ulimit{Name: strings.ToLower(u.Name), Soft: limit(u.Soft), Hard: limit(u.Hard)})
	}
	return nil
}

func (p *plan) planMounts(c *container.Config, h *container.HostConfig) error {
	taken := map[string]bool{}
	add := func(m plannedMount) error {
		if !path.IsAbs(m.target) {
			return invalid("invalid mount path: '%s' mount path must be absolute", m.target)
		}
		m.target = path.Clean(m.target)
		if m.target == "/" {
			return invalid("invalid specification: destination can't be '/'")
		}
		if taken[m.target] {
			return invalid("Duplicate mount point: %s", m.target)
		}
		taken[m.target] = true
		p.mounts = append(p.mounts, m)
		return nil
	}
	for _, bind := range h.Binds {
		m, err := parseBind(bind)
		if err != nil {
			return err
		}
		if err := add(m); err != nil {
			return err
		}
	}
	for _, m := range h.Mounts {
		planned, err := planMount(m)
		if err != nil {
			return err
		}
		if err := add(planned); err != nil {
			return err
		}
	}
	for target, options := range h.Tmpfs {
		m, err := parseTmpfs(target, options)
		if err != nil {
			return err
		}
		if err := add(m); err != nil {
			return err
		}
	}
	for target := range c.Volumes {
		if taken[path.Clean(target)] {
			continue // the user has mounted something there
		}
		if err := add(plannedMount{kind: mount.TypeVolume, target: target, copyUp: true}); err != nil {
			return err
		}
	}
	// Outer mounts before what lies in them; the maps above have no order of their own.
	slices.SortFunc(p.mounts, func(a, b plannedMount) int {
		if d := strings.Count(a.target, "/") - strings.Count(b.target, "/"); d != 0 {
			return d
		}
		return strings.Compare(a.target, b.target)
	})
	return nil
}

// parseBind reads SRC:DST[:OPTIONS]. A source without a slash at its beginning names a volume.
func parseBind(text string) (plannedMount, error) {
	bad := func(why string) (plannedMount, error) {
		return plannedMount{}, invalid("invalid volume specification: '%s': %s", text, why)
	}
	parts := strings.Split(text, ":")
	m := plannedMount{kind: mount.TypeBind, create: true, recursive: true, copyUp: true}
	switch len(parts) {
	case 1:
		m.kind, m.target = mount.TypeVolume, parts[0]
		return m, nil
	case 2, 3:
		m.source, m.target = parts[0], parts[1]
	default:
		return bad("want SOURCE:TARGET[:OPTIONS]")
	}
	if m.source == "" || m.target == "" {
		return bad("want SOURCE:TARGET[:OPTIONS]")
	}
	if !filepath.IsAbs(m.source) {
		if err := checkVolumeName(m.source); err != nil {
			return plannedMount{}, err
		}
		m.kind, m.create = mount.TypeVolume, false
	} else {
		m.source = filepath.Clean(m.source)
	}
	if len(parts) == 3 {
		m.optional = parts[2]
		for option := range strings.SplitSeq(parts[2], ",") {
			switch option {
			case "rw", "":
			case "ro":
				m.readonly = true
			case "z", "Z": // labels for SELinux, which nothing here uses
			case "rprivate", "private", "consistent", "cached", "delegated": // what they get anyway
			case "nocopy":
				if m.kind != mount.TypeVolume {
					return bad("nocopy is for volumes")
				}
				m.copyUp = false
			case "shared", "rshared", "slave", "rslave":
				return plannedMount{}, unsupported("mount propagation " + option + " in '" + text + "'")
			default:
				return bad("invalid mode: " + option)
			}
		}
	}
	return m, nil
}

// planMount reads one entry of HostConfig.Mounts.
func planMount(m mount.Mount) (plannedMount, error) {
	bad := func(why string) (plannedMount, error) {
		return plannedMount{}, invalid("invalid mount config for type %q: %s", m.Type, why)
	}
	if m.Target == "" {
		return bad("field Target must not be empty")
	}
	out := plannedMount{kind: m.Type, source: m.Source, target: m.Target, readonly: m.ReadOnly, recursive: true, copyUp: true}
	switch m.Type {
	case mount.TypeBind:
		if m.VolumeOptions != nil || m.TmpfsOptions != nil || m.ImageOptions != nil {
			return bad("options of another type of mount")
		}
		if !filepath.IsAbs(m.Source) {
			return bad("invalid mount path: '" + m.Source + "' mount path must be absolute")
		}
		out.source = filepath.Clean(m.Source)
		if o := m.BindOptions; o != nil {
			switch o.Propagation {
			case "", mount.PropagationRPrivate, mount.PropagationPrivate:
			default:
				return plannedMount{}, unsupported("mount propagation " + string(o.Propagation))
			}
			if o.ReadOnlyForceRecursive {
				return plannedMount{}, unsupported("BindOptions.ReadOnlyForceRecursive")
			}
			if o.ReadOnlyNonRecursive {
				return plannedMount{}, unsupported("BindOptions.ReadOnlyNonRecursive")
			}
			out.create, out.recursive = o.CreateMountpoint, !o.NonRecursive
		}
	case mount.TypeVolume:
		if m.BindOptions != nil || m.TmpfsOptions != nil || m.ImageOptions != nil {
			return bad("options of another type of mount")
		}
		if m.Source != "" {
			if err := checkVolumeName(m.Source); err != nil {
				return plannedMount{}, err
			}
		}
		if o := m.VolumeOptions; o != nil {
			if o.Subpath != "" {
				return plannedMount{}, unsupported("VolumeOptions.Subpath")
			}
			if len(o.Labels) > 0 {
				return plannedMount{}, unsupported("VolumeOptions.Labels")
			}
			if d := o.DriverConfig; d != nil && (d.Name != "" && d.Name != "local" || len(d.Options) > 0) {
				return plannedMount{}, unsupported("VolumeOptions.DriverConfig")
			}
			out.copyUp = !o.NoCopy
		}
	case mount.TypeTmpfs:
		if m.BindOptions != nil || m.VolumeOptions != nil || m.ImageOptions != nil {
			return bad("options of another type of mount")
		}
		if m.Source != "" {
			return bad("field Source must not be specified")
		}
		if o := m.TmpfsOptions; o != nil {
			if len(o.Options) > 0 {
				return plannedMount{}, unsupported("TmpfsOptions.Options")
			}
			if o.SizeBytes < 0 {
				return bad("SizeBytes must not be negative")
			}
			out.size, out.mode = o.SizeBytes, uint32(o.Mode)&0o7777
		}
	default:
		return plannedMount{}, unsupported("mounts of type " + strconv.Quote(string(m.Type)))
	}
	return out, nil
}

// parseTmpfs reads the mount options of --tmpfs.
func parseTmpfs(target, options string) (plannedMount, error) {
	m := plannedMount{kind: mount.TypeTmpfs, target: target, optional: options}
	for option := range strings.SplitSeq(options, ",") {
		name, value, _ := strings.Cut(option, "=")
		var err error
		switch name {
		case "", "rw", "nosuid", "nodev", "rprivate", "private": // what a tmpfs here has anyway
		case "exec", "noexec":
			m.exec = name == "exec"
		case "ro":
			m.readonly = true
		case "size":
			m.size, err = units.RAMInBytes(value)
		case "mode":
			var mode uint64
			mode, err = strconv.ParseUint(value, 8, 12)
			m.mode = uint32(mode)
		default:
			return m, unsupported("tmpfs option " + strconv.Quote(option))
		}
		if err != nil {
			return m, invalid("invalid tmpfs option %q", option)
		}
	}
	return m, nil
}

// defaultPath is docker's PATH for images that have none.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is what a process starts with: docker's own variables, overridden by env.
func environment(env []string, hostname, home string, terminal bool) []string {
	base := []string{defaultPath, "HOSTNAME=" + hostname}
	if terminal {
		base = append(base, "TERM=xterm")
	}
	out := mergeEnv(base, env)
	if home != "" && !slices.ContainsFunc(out, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") }) {
		out = append(out, "HOME="+home)
	}
	return out
}

// stopSignal is what a polite stop sends.
func (p *plan) stopSignal() syscall.Signal {
	if p.spec.StopSignal != 0 {
		return p.spec.StopSignal
	}
	return syscall.SIGTERM
}
