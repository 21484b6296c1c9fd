// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"strings"
	"sync"
	"testing/iotest"
	"time"
)

var discard = log.New(io.Discard, "", 0)

// Kind is a way to break a request.
type Kind string

// The ways to break a request.
const (
	Drop      Kind = "drop"      // close the connection without an answer
	DropBody  Kind = "dropbody"  // read half of the request's body, then close the connection
	Half      Kind = "half"      // hand on half of the request's body, then close the connection
	Busy      Kind = "busy"      // 429
	Fail      Kind = "fail"      // 500
	Gone      Kind = "gone"      // 503
	Missing   Kind = "missing"   // 404
	Truncate  Kind = "truncate"  // half of the body, then close the connection
	Short     Kind = "short"     // half of the body, told as all of it
	Corrupt   Kind = "corrupt"   // one byte changed
	WrongName Kind = "wrongname" // another Docker-Content-Digest
	Garble    Kind = "garble"    // one byte of the request's body changed
	Slow      Kind = "slow"      // the body in many pieces, with pauses
)

// Fault breaks requests on their way to a registry.
type Fault struct {
	mu    sync.Mutex // guards rules
	rules []*rule
}

type rule struct {
	kind         Kind
	method, part string
	left         int
}

// Break breaks the next n requests of method ("" for all) whose path contains part.
func (f *Fault) Break(kind Kind, n int, method, part string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{kind: kind, method: method, part: part, left: n})
}

// Heal ends all breaking and returns how many broken requests had still been asked for.
func (f *Fault) Heal() (left int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		left += r.left
	}
	f.rules = nil
	return left
}

func (f *Fault) take(r *http.Request) Kind {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, rule := range f.rules {
		if rule.left > 0 && (rule.method == "" || rule.method == r.Method) && strings.Contains(r.URL.Path, rule.part) {
			rule.left--
			return rule.kind
		}
	}
	return ""
}

func (f *Fault) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch kind := f.take(r); kind {
		case "":
			next.ServeHTTP(w, r)
		case Drop:
			panic(http.ErrAbortHandler)
		case DropBody:
			_, _ = io.CopyN(io.Discard, r.Body, r.ContentLength/2)
			panic(http.ErrAbortHandler)
		case Half:
			r.Body = io.NopCloser(io.MultiReader(io.LimitReader(r.Body, r.ContentLength/2), iotest.ErrReader(io.ErrUnexpectedEOF)))
			next.ServeHTTP(&recorder{header: http.Header{}, status: http.StatusOK}, r)
			panic(http.ErrAbortHandler)
		case Garble:
			first := make([]byte, 1)
			n, _ := io.ReadFull(r.Body, first)
			first[0] ^= 1
			r.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(bytes.NewReader(first[:n]), r.Body), r.Body}
			next.ServeHTTP(w, r)
		case Busy:
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
		case Fail:
			w.WriteHeader(http.StatusInternalServerError)
		case Missing:
			w.WriteHeader(http.StatusNotFound)
		case Gone:
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			rec := &recorder{header: http.Header{}, status: http.StatusOK}
			next.ServeHTTP(rec, r)
			rec.send(w, kind)
		}
	})
}

// recorder keeps a response so that it can be spoilt.
type recorder struct {
	header http.Header
	status int
	body   []byte
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { r.body = append(r.body, p...); return len(p), nil }

func (r *recorder) send(w http.ResponseWriter, kind Kind) {
	for k, v := range r.header {
		w.Header()[k] = v
	}
	body := r.body
	switch kind {
	case Short:
		w.Header().Del("Content-Length")
		body = body[:len(body)/2]
	case Truncate:
		body = body[:len(body)/2]
	case Corrupt:
		body = append([]byte(nil), body...)
		if len(body) > 0 {
			body[len(body)/2] ^= 1
		}
	case WrongName:
		w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
	}
	w.WriteHeader(r.status)
	for kind == Slow && len(body) > 0 {
		n := min(len(body), 4<<10)
		_, _ = w.Write(body[:n])
		body = body[n:]
		_ = http.NewResponseController(w).Flush()
		time.Sleep(time.Millisecond)
	}
	_, _ = w.Write(body)
	if kind == Truncate {
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		panic(http.ErrAbortHandler)
	}
}
