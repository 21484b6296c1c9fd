// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"time"
)

// retry makes requests again that failed for a reason that may pass. A request with a body is not made again
// here (the upload it belongs to starts over, see push.go), except a form, which token servers take.
//
// When the tries are used up it returns an error even if there was a response, so that the libraries above do
// not start their own rounds of retries on top.
type retry struct {
	next  http.RoundTripper
	tries int
	wait  func(context.Context, time.Duration) error
}

// passing is a failure that may pass.
type passing struct {
	host   string
	status int // 0 when there was no response
	err    error
	after  time.Duration // what the registry asked to wait
	tries  int
}

func (e *passing) Error() string {
	what := fmt.Sprint(e.err)
	if e.status != 0 {
		what = fmt.Sprintf("%d %s", e.status, http.StatusText(e.status))
	}
	if e.tries > 1 {
		what = fmt.Sprintf("%s (tried %d times)", what, e.tries)
	}
	return what
}

func (t *retry) RoundTrip(req *http.Request) (*http.Response, error) {
	form := req.Header.Get("Content-Type") == "application/x-www-form-urlencoded" && req.GetBody != nil
	tries := t.tries
	if req.Body != nil && req.Body != http.NoBody && !form {
		tries = 1
	}
	for try := 1; ; try++ {
		resp, err := t.next.RoundTrip(req)
		p := transient(req.Context(), resp, err)
		if p == nil {
			return resp, err
		}
		p.host, p.tries = req.URL.Host, try
		if resp != nil {
			_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
			resp.Body.Close()
		}
		if try >= tries {
			return nil, p
		}
		if err := t.wait(req.Context(), pause(try, p.after)); err != nil {
			return nil, err
		}
		if form {
			body, err := req.GetBody()
			if err != nil {
				return nil, err
			}
			req = req.Clone(req.Context())
			req.Body = body
		}
	}
}

// transient returns what may pass about a failure, or nil.
func transient(ctx context.Context, resp *http.Response, err error) *passing {
	if err == nil {
		switch resp.StatusCode {
		case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			p := &passing{status: resp.StatusCode}
			if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
				p.after = time.Duration(s) * time.Second
			}
			return p
		}
		return nil
	}
	if ctx.Err() != nil {
		return nil
	}
	if broken(err) {
		return &passing{err: err}
	}
	return nil
}

// broken says whether err is a connection that broke, rather than one that cannot be had.
func broken(err error) bool {
	var p *passing
	if errors.As(err, &p) || errors.As(err, new(*garbled)) {
		return true
	}
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return true
	}
	// Not a time-out while connecting: the host is not there, and three times as long will not bring it.
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return false
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// pause is how long to wait after the n-th try: about 0.25 s, 1 s, 4 s …, or what the registry asked for.
func pause(n int, asked time.Duration) time.Duration {
	d := 250 * time.Millisecond << (2 * (n - 1))
	d += rand.N(d / 2) // parallel transfers must not come back in step
	return max(d, min(asked, 30*time.Second))
}

// again is how long to wait after err ended the n-th try of an upload.
func again(err error, n int) time.Duration {
	var p *passing
	if errors.As(err, &p) {
		return pause(n, p.after)
	}
	return pause(n, 0)
}

// tried notes in err that it ended the n-th try of an upload.
func tried(err error, n int) error {
	var p *passing
	if errors.As(err, &p) {
		p.tries = max(p.tries, n)
	}
	return err
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
