// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"expvar"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/moby/buildkit/util/tracing/detect"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"golang.org/x/net/trace"

	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/config"
)

// spanExporter sends spans where the OTEL_* variables say; nil when they say nothing.
func spanExporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	exporter, err := detect.NewSpanExporter(ctx)
	if err != nil {
		return nil, fmt.Errorf("traces (OTEL_* variables): %w", err)
	}
	if exporter == nil || detect.IsNoneSpanExporter(exporter) {
		return nil, nil
	}
	return exporter, nil
}

// serveDebug serves buildkitd's debugging pages at address ("HOST:PORT", or unix://PATH) until stop is called. Whoever reaches
// them sees the memory of the engine.
func serveDebug(address string, e *engine.Engine) (stop func(), err error) {
	var l net.Listener
	if scheme, _, ok := strings.Cut(address, "://"); ok && scheme == "unix" {
		path, err := socketPath(address)
		if err != nil {
			return nil, fmt.Errorf("debugging pages: %w", err)
		}
		if l, err = listen(context.Background(), path, config.GRPC{}); err != nil {
			return nil, fmt.Errorf("debugging pages: %w", err)
		}
	} else if l, err = net.Listen("tcp", strings.TrimPrefix(address, "tcp://")); err != nil {
		return nil, fmt.Errorf("debugging pages at %s: %w", address, reason(err))
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() {
		e.Log().Warn("the debugging pages are open to other machines: they show the memory of the engine", "at", l.Addr())
	}
	server := &http.Server{Handler: debugPages(e), ReadHeaderTimeout: time.Minute}
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			e.Log().Warn("serve debugging pages", "error", err)
		}
	}()
	return func() { _ = server.Close() }, nil
}

func debugPages(e *engine.Engine) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/debug/vars", expvar.Handler())
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/block", func(w http.ResponseWriter, r *http.Request) {
		// Waiting is only counted while somebody asks.
		runtime.SetBlockProfileRate(int(10 * time.Microsecond))
		defer runtime.SetBlockProfileRate(0)
		pprof.Handler("block").ServeHTTP(w, r)
	})
	// Who may ask is decided by the address. (The package's own rule would be loopback.)
	mux.HandleFunc("/debug/requests", func(w http.ResponseWriter, r *http.Request) { trace.Render(w, r, true) })
	mux.HandleFunc("/debug/events", func(w http.ResponseWriter, r *http.Request) { trace.RenderEvents(w, r, true) })
	mux.HandleFunc("/debug/gc", func(http.ResponseWriter, *http.Request) { runtime.GC() })
	for _, page := range []string{"/debug/cache/", "/debug/compaction", "/debug/flight/"} {
		mux.HandleFunc(page, func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, "not supported: "+r.URL.Path+" shows BuildKit's own databases: see 'slipway explain' and 'slipway cache du'", http.StatusNotImplemented)
		})
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{PidFn: func() (int, error) { return os.Getpid(), nil }}))
	metrics.MustRegister(e.Metrics()...)
	mux.Handle("/metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
}
