// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log"
	"net/http"
	"os"
	"sync"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // its storage
	"github.com/sirupsen/logrus"
)

// plainRegistry is a registry (distribution/distribution) on loopback, without TLS and passwords, with its blobs in a directory. It works in the
// bench's own process: its processor time is nobody's.
type plainRegistry struct {
	host string // host:port

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
	r := &plainRegistry{
		host: listener.Addr().String(), cancel: cancel, served: make(chan error, 1),
		server: &http.Server{Handler: handlers.NewApp(ctx, conf), ErrorLog: log.New(devNull{}, "", 0)},
	}
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

type devNull struct{}

func (devNull) Write(p []byte) (int, error) { return len(p), nil }
