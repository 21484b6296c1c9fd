// SPDX-License-Identifier: Apache-2.0

//go:build linux

package runc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/executor"
)

const (
	// initFailed is the exit code of libcontainer's init when the last step, execve, fails.
	initFailed = 255
	// headSize is how much of an output is kept to recognise that.
	headSize = 512
	// endOfTransmission is what a terminal takes for the end of the input.
	endOfTransmission = 4
	// ptyTimeout bounds the wait for a terminal that has been sent before we look for it.
	ptyTimeout = 5 * time.Second
)

// stdio connects a container's standard streams with the caller's: by pipes, or by a pseudo-terminal that libcontainer
// makes inside the container and sends over a socket.
type stdio struct {
	caller   executor.IO
	terminal bool
	theirs   []*os.File // the container's ends

	console *net.UnixConn // where the terminal arrives
	stdin   *os.File      // our end of stdin; nil when there is none or the terminal has it
	outputs []*output
	wg      sync.WaitGroup // the outputs

	mu     sync.Mutex // guards pty and stdin against close
	pty    *os.File
	closed bool
}

// output is one stream from the container to the caller.
type output struct {
	src   *os.File
	dst   io.Writer
	head  bytes.Buffer // its first bytes
	total int64
}

func newStdio(terminal bool, caller executor.IO) (_ *stdio, err error) {
	s := &stdio{caller: caller, terminal: terminal}
	defer func() {
		if err != nil {
			s.closeTheirs()
			s.close()
		}
	}()
	if terminal {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		s.theirs = []*os.File{os.NewFile(uintptr(fds[1]), "console")}
		ours := os.NewFile(uintptr(fds[0]), "console")
		defer ours.Close()
		c, err := net.FileConn(ours)
		if err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		s.console = c.(*net.UnixConn)
		return s, nil
	}
	if caller.Stdin == nil {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		s.theirs = append(s.theirs, null)
	} else {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		s.theirs, s.stdin = append(s.theirs, r), w
	}
	for _, dst := range []io.Writer{caller.Stdout, caller.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		s.theirs = append(s.theirs, w)
		s.outputs = append(s.outputs, newOutput(r, dst))
	}
	return s, nil
}

func newOutput(src *os.File, dst io.Writer) *output {
	if dst == nil {
		dst = io.Discard
	}
	return &output{src: src, dst: dst}
}

// closeTheirs closes the container's ends once the container has them.
func (s *stdio) closeTheirs() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
}

// begin starts copying. The container has started.
func (s *stdio) begin() error {
	if s.terminal {
		pty, err := s.receivePTY()
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		s.pty = pty
		s.outputs = []*output{newOutput(pty, s.caller.Stdout)}
	}
	for _, o := range s.outputs {
		s.wg.Go(o.copy)
	}
	if s.caller.Stdin == nil {
		return nil
	}
	// Nobody waits for this goroutine: it may be in a read of the caller's that only the caller can end.
	if s.terminal {
		go func(pty *os.File) {
			if _, err := io.Copy(writerOnly{pty}, s.caller.Stdin); err == nil {
				_, _ = pty.Write([]byte{endOfTransmission})
			}
		}(s.pty)
		return nil
	}
	go func(stdin *os.File) {
		_, _ = io.Copy(writerOnly{stdin}, s.caller.Stdin)
		stdin.Close()
	}(s.stdin)
	return nil
}

// writerOnly hides ReadFrom: splicing would hold on to a file of the caller's for longer than one read.
type writerOnly struct{ io.Writer }

// receivePTY takes the terminal from the socket, where it has been since before the container reported as started.
func (s *stdio) receivePTY() (*os.File, error) {
	defer s.console.Close()
	_ = s.console.SetReadDeadline(time.Now().Add(ptyTimeout))
	buf, oob := make([]byte, 256), make([]byte, unix.CmsgSpace(4))
	_, oobn, _, _, err := s.console.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return nil, errors.New("no terminal was sent")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("no terminal was sent")
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // so that reads take part in polling and can be ended
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "pty"), nil
}

func (s *stdio) resize(rows, cols uint16) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.terminal {
		return errors.New("it has none")
	}
	if s.closed {
		return os.ErrClosed
	}
	raw, err := s.pty.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	err = raw.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
	return errors.Join(err, ioctlErr)
}

// finish waits until everything that the container wrote has been delivered. The container has ended.
func (s *stdio) finish() {
	for _, o := range s.outputs {
		// Normally the stream has ended by itself. If somebody outside was given its other end, reading ends here.
		_ = o.src.SetReadDeadline(time.Now())
	}
	s.wg.Wait()
}

// close closes our ends.
func (s *stdio) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.console != nil {
		s.console.Close()
	}
	if s.stdin != nil {
		s.stdin.Close()
	}
	for _, o := range s.outputs {
		o.src.Close()
	}
}

// copy delivers the stream until it ends. A destination that fails gets no more, but the container is not held up.
func (o *output) copy() {
	buf := make([]byte, 32<<10)
	for {
		n, err := o.src.Read(buf)
		o.deliver(buf[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(buf)
			return
		}
		if err != nil { // the end of the stream, or EIO: the last one with the terminal open has gone
			return
		}
	}
}

// drain delivers what is in the stream now, without waiting for more.
func (o *output) drain(buf []byte) {
	_ = o.src.SetReadDeadline(time.Time{})
	raw, err := o.src.SyscallConn()
	if err != nil {
		return
	}
	for {
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf)
			return true // whatever the result: do not wait
		})
		if err != nil || n <= 0 {
			return
		}
		o.deliver(buf[:n])
	}
}

func (o *output) deliver(b []byte) {
	if len(b) == 0 {
		return
	}
	if room := headSize - o.head.Len(); room > 0 {
		o.head.Write(b[:min(room, len(b))])
	}
	o.total += int64(len(b))
	if _, err := o.dst.Write(b); err != nil {
		o.dst = io.Discard
	}
}

// execFailure recognises the one start error that can no longer be reported as such: execve itself failed (a script
// without its interpreter, a binary of another machine). libcontainer's init then writes one line and exits with 255.
func (s *stdio) execFailure() (code int, failed bool) {
	var text string
	var total int64
	for _, o := range s.outputs {
		text += o.head.String()
		total += o.total
	}
	text, oneLine := strings.CutSuffix(strings.ReplaceAll(text, "\r", ""), "\n")
	if !oneLine || total > headSize || strings.Contains(text, "\n") || !strings.HasPrefix(text, "exec /") {
		return 0, false
	}
	switch {
	case strings.HasSuffix(text, ": "+unix.ENOENT.Error()):
		return 127, true
	case strings.HasSuffix(text, ": "+unix.ENOEXEC.Error()), strings.HasSuffix(text, ": "+unix.EACCES.Error()),
		strings.HasSuffix(text, ": "+unix.ENOTDIR.Error()), strings.HasSuffix(text, ": "+unix.ELIBBAD.Error()),
		strings.HasSuffix(text, ": "+unix.EPERM.Error()), strings.HasSuffix(text, ": "+unix.ETXTBSY.Error()):
		return 126, true
	}
	return 0, false
}
