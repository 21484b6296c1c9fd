// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/platforms"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
	"github.com/seed-68981b69/slipway/engine/config"
	"github.com/seed-68981b69/slipway/engine/provenance"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/cdi"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/userns"
)

// The places of configuration files, for everybody and below a user's own directory.
const (
	ownConfig       = "slipway/slipway.toml"
	buildkitdConfig = "buildkit/buildkitd.toml"
)

// loadConfig reads the file of --config, or the first one that there is: an ordinary user's own, ours, or BuildKit's. Of BuildKit's, state
// directory and addresses are not taken: they are those of a buildkitd, which may be running.
func (a *app) loadConfig() (config.Config, error) {
	if a.config != "" {
		return config.Load(a.config)
	}
	own, theirs := []string{filepath.Join("/etc", ownConfig)}, filepath.Join("/etc", buildkitdConfig)
	if dir := config.UserDir(); dir != "" && ordinaryUser() {
		own = append([]string{filepath.Join(dir, ownConfig)}, own...)
	}
	conf, err := config.LoadFirst(append(own, theirs)...)
	if conf.Path == theirs {
		conf.Root, conf.GRPC, conf.OTEL.SocketPath = "", config.GRPC{}, ""
	}
	return conf, err
}

// engineOptions makes of a configuration what an engine is opened with, but for its state directory.
func engineOptions(conf *config.Config) (engine.Options, error) {
	oci := &conf.Worker.OCI
	level, err := conf.LogLevel()
	if err != nil {
		return engine.Options{}, err
	}
	if oci.Rootless && !userns.Inside() {
		return engine.Options{}, errors.New("worker.oci.rootless: this is root of the host: start the engine as an ordinary user, or in a user namespace")
	}
	options := engine.Options{
		Level: level, LogJSON: conf.Log.Format == "json",
		Jobs:         oci.MaxParallelism,
		GC:           engine.GC{Off: oci.GC != nil && !*oci.GC, Rules: func(d cache.Disk) []cache.Policy { return oci.Policies(d) }},
		Registries:   conf.Hosts(),
		Entitlements: conf.Entitlements,
		NetworkPool:  oci.NetworkPoolSize,
		CgroupParent: oci.CgroupParent,
		ExtraCA:      conf.Slipway.ExtraCA,
		Labels:       oci.Labels,
		Warnings:     conf.Warnings,
		Frontends: buildkitapi.Frontends{
			NoDockerfile: off(conf.Frontends.Dockerfile.Enabled), NoGateway: off(conf.Frontends.Gateway.Enabled),
			Repositories: conf.Frontends.Gateway.AllowedRepositories,
		},
	}
	switch oci.NetworkMode {
	case "", "auto", "bridge":
	case "host":
		options.Network = executor.NetworkHost
	case "none":
		options.Network = executor.NetworkNone
	default:
		return options, fmt.Errorf("network mode %q is not supported: there are bridge, host and none (and auto, which is bridge)", oci.NetworkMode)
	}
	for _, name := range oci.Platforms {
		p, err := platforms.Parse(name)
		if err != nil {
			return options, fmt.Errorf("platform %q: %w", name, err)
		}
		options.Platforms = append(options.Platforms, platforms.Normalize(p))
	}
	if d := conf.DNS; d != nil {
		options.DNS = &network.DNS{Nameservers: d.Nameservers, SearchDomains: d.SearchDomains, Options: d.Options}
	}
	if !on(conf.CDI.Disabled) {
		options.Devices = cdi.New(conf.CDI.SpecDirs, conf.CDI.AutoAllowed)
	}
	provenanceDir := conf.ProvenanceEnvDir
	if provenanceDir == "" {
		provenanceDir = filepath.Join("/etc", "buildkit", "provenance.d")
	}
	if options.Provenance, err = provenance.ReadEnvironment(provenanceDir); err != nil {
		return engine.Options{}, err
	}
	if h := conf.History; h != nil {
		options.History.MaxAge = h.MaxAge.Duration
		if h.MaxEntries != nil {
			options.History.MaxBuilds = int(*h.MaxEntries)
			options.History.Off = *h.MaxEntries == 0
		}
	}
	if n := conf.System.MaxRegistryConcurrency; n != nil {
		options.RegistryConns = *n
	}
	if t := conf.System.SessionAuthTimeout; t != nil {
		options.SessionAuthTimeout = &t.Duration
	}
	return options, nil
}

func on(enabled *bool) bool { return enabled != nil && *enabled }

func off(enabled *bool) bool { return enabled != nil && !*enabled }
