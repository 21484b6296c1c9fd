// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"sync"
	"sync/atomic"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // its storage
	"github.com/sirupsen/logrus"
)

// plainRegistry is a registry (distribution/distribution) on loopback, without TLS and passwords, with its blobs in a directory. It works in the
// bench's own process: its processor time is nobody's.
type plainRegistry struct {
	host string // host:port

	// received and sent are the bytes of the bodies of requests and answers so far.
	received, sent atomic.Int64

	server *http.Server
	cancel context.CancelFunc
	served chan error
}

var quietRegistry sync.Once

func startRegistry(dir string) (*plainRegistry, error) {
	quietRegistry.Do(func() { logrus.SetLevel(logrus.PanicLevel) })
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	conf := &configuration.Configuration{Storage: configuration.Storage{"filesystem": {"rootdirectory": dir}}}
	conf.HTTP.Secret = "bench"
	conf.Catalog.MaxEntries = 100
	conf.Log.AccessLog.Disabled = true
	listener, err := listenCounted()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &plainRegistry{host: listener.Addr().String(), cancel: cancel, served: make(chan error, 1)}
	app := handlers.NewApp(ctx, conf)
	r.server = &http.Server{ErrorLog: log.New(devNull{}, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		req.Body = countedBody{req.Body, &r.received}
		app.ServeHTTP(&countedAnswer{w, &r.sent}, req)
	})}
	go func() { r.served <- r.server.Serve(listener) }()
	return r, nil
}

// close ends the registry; its directory stays.
func (r *plainRegistry) close() error {
	err := r.server.Close()
	if served := <-r.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	r.cancel()
	return err
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

type countedAnswer struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (a *countedAnswer) Write(p []byte) (int, error) {
	n, err := a.ResponseWriter.Write(p)
	a.n.Add(int64(n))
	return n, err
}

// ReadFrom leaves files to the kernel (sendfile), as without the counting.
func (a *countedAnswer) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(a.ResponseWriter, r)
	a.n.Add(n)
	return n, err
}

func (a *countedAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

type devNull struct{}

func (devNull) Write(p []byte) (int, error) { return len(p), nil }
