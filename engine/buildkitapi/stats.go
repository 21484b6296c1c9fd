// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"time"

	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/prometheus/client_golang/prometheus"
)

// stats are numbers of builds that have ended, by the names that BuildKit's have in Prometheus' form.
type stats struct {
	builds   *prometheus.CounterVec
	steps    *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newStats() stats {
	return stats{
		builds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "buildkit_builds_total", Help: "Builds that have ended, by status and, when they failed, gRPC error code.",
		}, []string{"status", "error_code"}),
		steps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "buildkit_builds_steps_total", Help: "Steps of builds that have ended, by kind (completed, cached, total, warnings).",
		}, []string{"kind"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "buildkit_build_duration_seconds", Help: "How long builds took.",
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160,
		}, []string{"status"}),
	}
}

// add counts a build that has ended.
func (st stats) add(started time.Time, r *recorder, err error) {
	status, code := "success", ""
	if err != nil {
		status, code = "failure", grpcerrors.Code(err).String()
	}
	r.mu.Lock()
	c := r.counts
	r.mu.Unlock()
	st.builds.WithLabelValues(status, code).Inc()
	for kind, n := range map[string]int{"completed": c.completed, "cached": c.cached, "total": c.total, "warnings": c.warnings} {
		st.steps.WithLabelValues(kind).Add(float64(n))
	}
	st.duration.WithLabelValues(status).Observe(time.Since(started).Seconds())
}

// Metrics are for a Prometheus registry.
func (s *Server) Metrics() []prometheus.Collector {
	running := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "slipway_builds_running", Help: "Builds that are running."},
		func() float64 { return float64(s.Active()) })
	return []prometheus.Collector{s.stats.builds, s.stats.steps, s.stats.duration, running}
}
