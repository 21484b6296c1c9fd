// SPDX-License-Identifier: Apache-2.0

// Package executor runs processes in containers. A Spec is everything one process needs and says nothing
// about how it will be isolated; an Executor turns it into a container. Nothing here knows what an image, a
// build or a cache is: whoever calls has mounted the root file system and resolved users and secrets.
package executor

import (
	"context"
	"io"
	"syscall"
	"time"
)

// Spec describes one container and its first process.
type Spec struct {
	// ID names the container among those alive on this engine: letters, digits, '.', '_' and '-'.
	ID string
	// Rootfs is the directory that becomes "/". The caller owns it and what is mounted there.
	Rootfs string
	// ReadonlyRootfs mounts the root read-only.
	ReadonlyRootfs bool
	// Mounts are made in order, over Rootfs and each other.
	Mounts []Mount

	Args []string
	Env  []string
	// Cwd is an absolute path inside the container; it is created when missing.
	Cwd string
	// User is numeric; names were resolved by the caller (ResolveUser).
	User User
	// Terminal gives the process a pseudo-terminal; IO.Stdout then has both streams.
	Terminal bool
	// Rows and Cols are the terminal's size from the beginning, in characters; 0 leaves it to Resize.
	Rows, Cols uint16
	// Joinable allows further processes in the container (Joiner). Such a container takes longer to start.
	Joinable bool

	Hostname   string
	ExtraHosts []HostEntry
	Network    NetworkMode
	// OwnHosts gives a container in the host's network an /etc/hosts of its own, as containers in other networks have it, instead
	// of one that begins as the host's.
	OwnHosts bool
	// Nameservers, DNSSearch and DNSOptions take the place of what the host has of each in /etc/resolv.conf.
	Nameservers, DNSSearch, DNSOptions []string
	// Ports are published from the host; only with NetworkBridge.
	Ports []Port

	// Privileged lifts seccomp, capabilities, masked paths and the device filter.
	Privileged bool
	// Devices are CDI devices of the host by their full names, which bring nodes, mounts and variables of their own.
	Devices []string
	// CapAdd and CapDrop change the default capability set ("CAP_…" or "ALL").
	CapAdd, CapDrop []string
	// SeccompUnconfined lifts seccomp alone.
	SeccompUnconfined bool
	// SeccompProfile takes the place of the default profile, in docker's JSON; "" is the default. A privileged container has this one too.
	SeccompProfile string
	// NoNewPrivileges is set for build steps by whoever wants it; docker's default for containers is false.
	NoNewPrivileges bool
	Ulimits         []Ulimit
	// ShmSize is the size of /dev/shm in bytes; 0 means 64 MiB.
	ShmSize int64
	// CgroupParent is relative to the engine's own cgroup.
	CgroupParent string
	Resources    Resources
	// Init puts a small init in front of the process that reaps children and forwards signals.
	Init bool
	// StopSignal is what a polite stop sends; 0 means SIGTERM.
	StopSignal syscall.Signal
}

// MountKind says where a Mount's content comes from.
type MountKind string

// The kinds of a Mount.
const (
	MountBind  MountKind = "bind"
	MountTmpfs MountKind = "tmpfs"
)

// Mount is one file system or file visible in the container.
type Mount struct {
	Kind MountKind
	// Source is a host path (bind). It must exist; the caller has resolved it safely.
	Source string
	// Target is an absolute path in the container. It is created when missing, resolved inside Rootfs; the
	// mount points made for mounts are removed again when the process has ended (see Executor.Run).
	Target   string
	Readonly bool
	// SizeBytes and Mode are for tmpfs; 0 means no limit and 1777.
	SizeBytes int64
	Mode      uint32
	// Recursive makes a bind mount take the mounts below Source along.
	Recursive bool
	// NoExec forbids to execute files in it.
	NoExec bool
}

// User is the identity of a process.
type User struct {
	UID, GID         uint32
	AdditionalGroups []uint32
}

// HostGateway is the address of a HostEntry that stands for the host itself, as in docker's --add-host.
const HostGateway = "host-gateway"

// HostEntry is one line of /etc/hosts. IP is an address or HostGateway.
type HostEntry struct{ Host, IP string }

// NetworkMode says which network a container sees.
type NetworkMode string

// The network modes. Bridge has its own namespace, an address and NAT to the outside.
const (
	NetworkBridge NetworkMode = "bridge"
	NetworkHost   NetworkMode = "host"
	NetworkNone   NetworkMode = "none"
)

// Port publishes a container's port on the host.
type Port struct {
	HostIP        string // "" means all addresses, 0.0.0.0 all of IPv4, "::" all of IPv6
	HostPort      uint16 // 0 means any free one
	HostPortEnd   uint16 // when not 0: the first free one from HostPort to this one
	ContainerPort uint16
	Protocol      string // "tcp" or "udp"
}

// Ulimit is one resource limit by its lower-case name ("nofile").
type Ulimit struct {
	Name       string
	Soft, Hard uint64
}

// Resources are limits of the container's cgroup; zero values mean no limit.
type Resources struct {
	MemoryBytes     int64
	MemorySwapBytes int64
	CPUShares       uint64
	CPUPeriod       uint64
	CPUQuota        int64
	CpusetCpus      string
	CpusetMems      string
	PidsLimit       int64
}

// IO connects the process. Nil streams read nothing and discard. Stdout and Stderr are written from one
// goroutine each and are complete when Wait returns.
type IO struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Exit is how a process ended.
type Exit struct {
	// Code is the exit code as a shell gives it: 128+n after signal n, 127 command not found, 126 not executable.
	Code int
	// OOMKilled says that the kernel killed something in the container for lack of memory.
	OOMKilled bool
	// PeakMemoryBytes and CPUTime come from the container's cgroup; 0 when it does not tell. Page cache does not count as
	// memory that was needed.
	PeakMemoryBytes int64
	CPUTime         time.Duration
	// ReadBytes and WrittenBytes are what went from and to disks, by the container's cgroup; 0 when it does not tell. What the page
	// cache had, or has not written yet, is not in them.
	ReadBytes, WrittenBytes int64
	Started, Ended          time.Time
}

// Process is a started container. Its methods may be called from any goroutine.
type Process interface {
	// Wait returns when the process has ended, its output has been delivered and nothing of the container is left. An exit
	// code other than 0 is not an error; an error means that the container could not be run.
	Wait() (Exit, error)
	Signal(syscall.Signal) error
	// Resize sets the size of the terminal, in characters.
	Resize(rows, cols uint16) error
	// Ports are the published ports with host ports filled in.
	Ports() []Port
	// IP is the container's address, "" without a network of its own.
	IP() string
}

// ProcessSpec describes a further process of a container. What it does not name is as for the container's first process:
// namespaces, mounts, limits of the cgroup, seccomp profile. A process whose user is not root has no capabilities.
type ProcessSpec struct {
	Args []string
	Env  []string
	// Cwd is an absolute path inside the container; it must exist. "" means "/".
	Cwd      string
	User     User
	Terminal bool
	Ulimits  []Ulimit
}

// Joiner is a Process whose container takes further processes: one that was started from a Spec with Joinable.
type Joiner interface {
	Process
	// Join starts a further process. It ends with the container's first one at the latest, and when ctx ends. Errors are
	// those of Executor.Start; one that wraps os.ErrProcessDone says that the container has ended.
	Join(ctx context.Context, s ProcessSpec, stdio IO) (Process, error)
}

// Executor starts containers. Its methods may be called concurrently.
type Executor interface {
	// Start starts the container of s. When ctx ends, everything in the container is killed. An error names
	// what could not be done (a StartError for what the user did: no such command, not executable, bad directory).
	Start(ctx context.Context, s Spec, stdio IO) (Process, error)
}

// StartError is a process that could not be started because of what it was asked to run.
type StartError struct {
	// Code is 127 when the command was not found and 126 when it could not be executed.
	Code int
	Err  error
}

func (e *StartError) Error() string { return e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }
