// SPDX-License-Identifier: Apache-2.0

// Package config reads the engine's configuration file, which is BuildKit's buildkitd.toml (v0.34.2): the same keys with the same
// meaning. A key whose wish cannot be fulfilled is refused by name; a key that nobody knows is named in a warning. Which key is what
// is in Keys. The package only reads: what is made of the values is the engine's and the command's.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/seed-68981b69/slipway/cache/registry"
)

// Config is what a configuration file says. Keys that it does not have are zero; a nil pointer is a switch that is not set.
type Config struct {
	// Debug and Trace are older spellings of Log.Level.
	Debug bool `toml:"debug"`
	Trace bool `toml:"trace"`
	// Root is the state directory.
	Root string `toml:"root"`
	// Entitlements are what any client may ask for; nil when the file does not say.
	Entitlements []string `toml:"insecure-entitlements"`
	// ProvenanceEnvDir has facts about this machine for the provenance of builds; "" means buildkit/provenance.d in /etc.
	ProvenanceEnvDir string `toml:"provenanceEnvDir"`

	Log  Log  `toml:"log"`
	GRPC GRPC `toml:"grpc"`
	OTEL struct {
		SocketPath string `toml:"socketPath"`
	} `toml:"otel"`
	Worker struct {
		OCI        OCI `toml:"oci"`
		Containerd struct {
			Enabled *bool `toml:"enabled"`
		} `toml:"containerd"`
	} `toml:"worker"`
	// CDI says which devices of the host builds can have.
	CDI struct {
		Disabled    *bool    `toml:"disabled"`
		SpecDirs    []string `toml:"specDirs"`
		AutoAllowed []string `toml:"autoAllowed"`
	} `toml:"cdi"`
	Registries map[string]Registry `toml:"registry"`
	DNS        *DNS                `toml:"dns"`
	History    *History            `toml:"history"`
	Frontends  struct {
		Dockerfile struct {
			Enabled *bool `toml:"enabled"`
		} `toml:"dockerfile.v0"`
		Gateway struct {
			Enabled             *bool    `toml:"enabled"`
			AllowedRepositories []string `toml:"allowedRepositories"`
		} `toml:"gateway.v0"`
	} `toml:"frontend"`
	System struct {
		MaxRegistryConcurrency *int      `toml:"maxRegistryConcurrency"`
		SessionAuthTimeout     *Duration `toml:"sessionAuthTimeout"`
	} `toml:"system"`

	// Slipway has the keys that BuildKit does not have.
	Slipway struct {
		// ExtraCA are PEM files with authorities that steps trust besides those of their images.
		ExtraCA []string `toml:"extraCA"`
	} `toml:"slipway"`

	// Path is the file that was read, "" when there was none.
	Path string `toml:"-"`
	// Warnings are what is said to no effect, a line each.
	Warnings []string `toml:"-"`
}

// Log says what is logged and how.
type Log struct {
	Format string `toml:"format"` // "text" (or "") or "json"
	Level  string `toml:"level"`  // "trace", "debug", "info", "warn" or "error"
}

// GRPC says where clients are served.
type GRPC struct {
	Address      []string `toml:"address"`
	DebugAddress string   `toml:"debugAddress"`
	UID          *int     `toml:"uid"`
	GID          *int     `toml:"gid"`
	TLS          TLS      `toml:"tls"`
}

// TLS names the PEM files of a server: its certificate, its key, and the authority that vouches for its clients.
type TLS struct {
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
	CA   string `toml:"ca"`
}

// OCI says how steps run and what is kept of them.
type OCI struct {
	Enabled *bool `toml:"enabled"`
	// Labels are shown to clients beside the engine's own.
	Labels map[string]string `toml:"labels"`
	// Platforms are what the engine says it can build for; none means what this machine can.
	Platforms []string `toml:"platforms"`

	GC               *bool     `toml:"gc"`
	GCKeepStorage    DiskSpace `toml:"gckeepstorage"`
	ReservedSpace    DiskSpace `toml:"reservedSpace"`
	MaxUsedSpace     DiskSpace `toml:"maxUsedSpace"`
	MinFreeSpace     DiskSpace `toml:"minFreeSpace"`
	GCPolicies       []Policy  `toml:"gcpolicy"`
	NetworkMode      string    `toml:"networkMode"`
	NetworkPoolSize  int       `toml:"cniPoolSize"`
	CgroupParent     string    `toml:"defaultCgroupParent"`
	MaxParallelism   int       `toml:"max-parallelism"`
	Rootless         bool      `toml:"rootless"`
	NoProcessSandbox bool      `toml:"noProcessSandbox"`
}

// Policy is one rule of garbage collection.
type Policy struct {
	All           bool      `toml:"all"`
	Filters       []string  `toml:"filters"`
	KeepDuration  Duration  `toml:"keepDuration"`
	KeepBytes     DiskSpace `toml:"keepBytes"` // the older name of ReservedSpace
	ReservedSpace DiskSpace `toml:"reservedSpace"`
	MaxUsedSpace  DiskSpace `toml:"maxUsedSpace"`
	MinFreeSpace  DiskSpace `toml:"minFreeSpace"`
}

// Registry are the settings of one registry host.
type Registry struct {
	Mirrors      []string  `toml:"mirrors"`
	HTTP         *bool     `toml:"http"`
	Insecure     *bool     `toml:"insecure"`
	CAs          []string  `toml:"ca"`
	KeyPairs     []KeyPair `toml:"keypair"`
	TLSConfigDir []string  `toml:"tlsconfigdir"`
}

// KeyPair names the files of a client certificate.
type KeyPair struct {
	Key  string `toml:"key"`
	Cert string `toml:"cert"`
}

// DNS is how names are resolved in steps, instead of the host's way.
type DNS struct {
	Nameservers   []string `toml:"nameservers"`
	Options       []string `toml:"options"`
	SearchDomains []string `toml:"searchDomains"`
}

// History bounds what is kept of builds that have ended.
type History struct {
	MaxAge     Duration `toml:"maxAge"`
	MaxEntries *int64   `toml:"maxEntries"` // 0 keeps nothing new
}

// Load reads a file. The error names every key that is refused.
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration file: %w", err)
	}
	c, err := parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("configuration file %s: %w", path, err)
	}
	c.Path = path
	for i, w := range c.Warnings {
		c.Warnings[i] = fmt.Sprintf("configuration file %s: %s", path, w)
	}
	return c, nil
}

// LoadFirst reads the first of paths that there is. None is no error.
func LoadFirst(paths ...string) (Config, error) {
	for _, p := range paths {
		c, err := Load(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return c, err
	}
	return Config{}, nil
}

// parse reads the text of a file.
func parse(data []byte) (Config, error) {
	var c Config
	tree := map[string]any{}
	if err := toml.Unmarshal(data, &tree); err != nil {
		return c, explain(err)
	}
	warnings, err := check(tree)
	if err != nil {
		return c, err
	}
	if err := toml.Unmarshal(data, &c); err != nil {
		return c, explain(err)
	}
	c.Warnings = warnings
	if err := c.validate(); err != nil {
		return c, err
	}
	return c, nil
}

// explain adds where the mistake is.
func explain(err error) error {
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, column := decode.Position()
		return fmt.Errorf("line %d, column %d: %s", row, column, strings.TrimPrefix(decode.Error(), "toml: "))
	}
	return err
}

// entitlements are the names that can be allowed.
var entitlements = []string{"network.host", "security.insecure", "device"}

// validate checks values that have one of a few forms.
func (c *Config) validate() error {
	if err := CheckEntitlements(c.Entitlements); err != nil {
		return fmt.Errorf("insecure-entitlements: %w", err)
	}
	switch c.Log.Format {
	case "", "text", "json":
	default:
		return fmt.Errorf("log.format: %q is neither text nor json", c.Log.Format)
	}
	if _, err := c.LogLevel(); err != nil {
		return fmt.Errorf("log.level: %w", err)
	}
	if n := c.System.MaxRegistryConcurrency; n != nil && *n <= 0 {
		return fmt.Errorf("system.maxRegistryConcurrency: must be greater than zero, is %d", *n)
	}
	if h := c.History; h != nil && h.MaxEntries != nil && *h.MaxEntries < 0 {
		return fmt.Errorf("history.maxEntries: must not be negative, is %d", *h.MaxEntries)
	}
	if n := c.Worker.OCI.MaxParallelism; n < 0 {
		return fmt.Errorf("worker.oci.max-parallelism: must not be negative, is %d", n)
	}
	if n := c.Worker.OCI.NetworkPoolSize; n < 0 {
		return fmt.Errorf("worker.oci.cniPoolSize: must not be negative, is %d", n)
	}
	return nil
}

// CheckEntitlements refuses names that are none.
func CheckEntitlements(names []string) error {
	for _, name := range names {
		known := false
		for _, e := range entitlements {
			known = known || e == name
		}
		if !known {
			return fmt.Errorf("invalid entitlement %q: there are %s", name, strings.Join(entitlements, ", "))
		}
	}
	return nil
}

// Hosts are the settings of registries, for cache/registry.
func (c *Config) Hosts() map[string]registry.Host {
	hosts := map[string]registry.Host{}
	for name, r := range c.Registries {
		h := registry.Host{Mirrors: r.Mirrors, HTTP: r.HTTP, Insecure: r.Insecure, CAs: r.CAs, TLSDirs: r.TLSConfigDir}
		for _, p := range r.KeyPairs {
			h.KeyPairs = append(h.KeyPairs, registry.KeyPair{Key: p.Key, Cert: p.Cert})
		}
		hosts[name] = h
	}
	return hosts
}

// UserDir is where a user's own configuration files are: $XDG_CONFIG_HOME or ~/.config; "" when there is no home.
func UserDir() string {
	if dir := os.Getenv("XDG_CONFIG_HOME"); dir != "" {
		return dir
	}
	if home := os.Getenv("HOME"); home != "" {
		return filepath.Join(home, ".config")
	}
	return ""
}
