// SPDX-License-Identifier: Apache-2.0

// Package seen is what the program "inside" tells a test about the container that it runs in.
package seen

// Seen is what a process can learn about itself and its container.
type Seen struct {
	PID, PPID, Session int
	UID, GID           [4]uint32 // real, effective, saved, file system
	Groups             []uint32
	// Caps are the masks of /proc/self/status by their names there ("CapEff").
	Caps            map[string]uint64
	NoNewPrivileges bool
	Seccomp         int // 0 none, 2 a filter
	Filters         int // how many
	SigBlocked      uint64
	SigIgnored      uint64
	Umask           uint32
	OOMScoreAdj     int
	Nice            int
	Scheduler       int
	Personality     int
	DeathSignal     int
	TimerSlack      int // in nanoseconds
	// Rlimits are soft and hard limits by number.
	Rlimits  map[int][2]uint64
	Args     []string
	Env      []string
	Cwd      string
	Hostname string
	Mounts   []Mount
	// Namespaces are the names of this process's namespaces, by kind.
	Namespaces map[string]string
	// FDs are the open descriptors and what they are.
	FDs map[int]string
	// Dev is what is in /dev, by path.
	Dev map[string]Node
	// Limits are the files of the container's cgroup that were found, by their names.
	Limits map[string]string
	// Sysctls are some of /proc/sys, by path.
	Sysctls  map[string]string
	Loopback bool // the loopback interface is up
}

// Mount is a line of /proc/self/mountinfo.
type Mount struct {
	Root, Target string
	Options      []string // of the mount
	FS, Source   string
	FSOptions    []string
	Shared       bool // propagates to others
	// Writable says that a file could be made in it, or that it, a file, could be opened for writing.
	Writable bool
	// Empty says that there is nothing in it.
	Empty bool
	Mode  uint32
}

// Node is an entry of a directory.
type Node struct {
	Mode         uint32 // with its type
	UID, GID     uint32
	Major, Minor uint32
	Link         string
}
