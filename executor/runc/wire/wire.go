// SPDX-License-Identifier: Apache-2.0

// Package wire is the conversation between the engine and its runner process (cmd/slipway-runner): messages on a
// unix seqpacket socket, one JSON document a message, open files beside it as SCM_RIGHTS. Both ends come from one
// build (the runner is embedded in the engine), so there are no versions to agree on.
package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// SocketFD is where the runner finds its end of the socket.
const SocketFD = 3

// maxMessage bounds a message. What can be longer (the runtime spec) travels as a file.
const maxMessage = 64 << 10

// maxFiles bounds the files of one message.
const maxFiles = 8

// Op names what a Request asks for.
type Op string

// The operations of a Request.
const (
	// OpStart starts a container. Files: the runtime spec as JSON, without its seccomp profile, and in a second line the profile as JSON
	// (nothing when there is none): the same few profiles serve all containers and are large. Then either stdin, stdout and stderr or, with
	// Terminal, the socket on which the pseudo-terminal is to be sent.
	OpStart Op = "start"
	// OpSignal sends Signal to the first process of the container.
	OpSignal Op = "signal"
	// OpKill kills everything in the container, or one process that has joined it.
	OpKill Op = "kill"
	// OpJoin starts a further process, named ID, in Container. Files: the process of a runtime spec as JSON, then as for
	// OpStart.
	OpJoin Op = "join"
)

// Request is one message from the engine to the runner.
type Request struct {
	Op       Op     `json:"op"`
	ID       string `json:"id"`
	StateDir string `json:"stateDir,omitempty"`
	// Container is what an OpJoin's process joins.
	Container string `json:"container,omitempty"`
	Terminal  bool   `json:"terminal,omitempty"`
	// StandardInit has the container made by libcontainer's own init.
	StandardInit bool `json:"standardInit,omitempty"`
	Signal       int  `json:"signal,omitempty"`
}

// Kind says what an Event tells.
type Kind string

// The kinds of an Event. A container has either one Failed, or one Started and then one Exited.
const (
	Started Kind = "started"
	// Failed is a container that could not be started; nothing of it is left.
	Failed Kind = "failed"
	// Exited comes when the process has ended and everything of the container has been removed.
	Exited Kind = "exited"
)

// Class says whose fault a failed start is.
type Class string

// The classes of a failed start.
const (
	NotFound      Class = "not-found"
	NotExecutable Class = "not-executable"
	// Ended is a container that has no place for further processes any more.
	Ended Class = "ended"
	Other Class = "other"
)

// Event is one message from the runner to the engine.
type Event struct {
	Kind Kind   `json:"kind"`
	ID   string `json:"id"`
	PID  int    `json:"pid,omitempty"`

	Class   Class  `json:"class,omitempty"`
	Message string `json:"message,omitempty"`

	// Code is the exit code, 128+n after signal n.
	Code            int   `json:"code,omitempty"`
	OOMKilled       bool  `json:"oomKilled,omitempty"`
	PeakMemoryBytes int64 `json:"peakMemoryBytes,omitempty"`
	CPUNanos        int64 `json:"cpuNanos,omitempty"`
	ReadBytes       int64 `json:"readBytes,omitempty"`
	WrittenBytes    int64 `json:"writtenBytes,omitempty"`
}

// Pair makes a connected pair: the engine's end and the file that becomes the runner's end.
func Pair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "runner-socket")
	ours, err := Conn(os.NewFile(uintptr(fds[0]), "engine-socket"))
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// Conn turns a socket's file into a connection and closes the file.
func Conn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%s: not a unix socket", f.Name())
	}
	return uc, nil
}

// Send writes one message. It may be called from several goroutines: the kernel keeps messages whole.
func Send(c *net.UnixConn, msg any, files ...*os.File) error {
	b, err := json.Marshal(msg)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(b) > maxMessage {
		return fmt.Errorf("message of %d bytes is longer than %d", len(b), maxMessage)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// buffers are for whole messages, of which a step has several.
var buffers = sync.Pool{New: func() any { return new([maxMessage]byte) }}

// Receive reads one message into msg and returns the files that came with it; the caller closes them. It returns
// io.EOF when the other end has gone.
func Receive(c *net.UnixConn, msg any) ([]*os.File, error) {
	pooled := buffers.Get().(*[maxMessage]byte)
	defer buffers.Put(pooled) // nothing decoded from JSON refers to it
	buf := pooled[:]
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) {
			return nil, io.EOF
		}
		return nil, err
	}
	files, err := parseRights(oob[:oobn])
	if err != nil {
		return nil, err
	}
	fail := func(err error) ([]*os.File, error) {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	if n == 0 {
		return fail(io.EOF)
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return fail(errors.New("message was cut short"))
	}
	if err := json.Unmarshal(buf[:n], msg); err != nil {
		return fail(fmt.Errorf("decode message: %w", err))
	}
	return files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	var files []*os.File
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}

// MemFile returns an anonymous file that holds b, to be read from its start by whoever gets it.
func MemFile(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", name, err)
	}
	return f, nil
}

// CgroupPrefix begins the name of the cgroup directory above the containers of one engine.
const CgroupPrefix = "slipway-"

// rlimits are the resource limits by the name the runtime spec has for them.
var rlimits = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}

// RlimitNumber returns the kernel's number of a resource limit named as in a runtime spec ("RLIMIT_NOFILE").
func RlimitNumber(name string) (int, bool) {
	n, ok := rlimits[name]
	return n, ok
}
