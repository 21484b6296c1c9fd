// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
	"github.com/seed-68981b69/slipway/engine/config"
)

// A binary or link of this name takes buildkitd's command line (v0.34.2) and does what it says, or refuses by name what it
// cannot do.
const buildkitdName = "buildkitd"

const (
	buildkitdRoot    = "/var/lib/buildkit"
	buildkitdAddress = "unix:///run/buildkit/buildkitd.sock"
	// buildkitdLevel is what buildkitd logs when nothing says otherwise.
	buildkitdLevel = "info"
)

// flagKind is what the value of a flag is.
type flagKind int

const (
	textFlag flagKind = iota
	listFlag          // may be repeated; commas mean nothing
	boolFlag
	numberFlag
)

// buildkitdFlag is one flag of buildkitd.
type buildkitdFlag struct {
	name  string
	kind  flagKind
	value string // the default that is shown
	usage string
	env   string // the variable that is the flag's value when the flag is not given
	// key is the one of the configuration file that means the same; its rules are the flag's.
	key string
	// set changes the configuration. Flags without it are refused unless their value asks for nothing, or mean nothing here.
	set func(*config.Config, flagValue) error
	// hidden is not shown by --help.
	hidden bool
}

// flagValue is a value in the form of its kind.
type flagValue struct {
	text   string
	list   []string
	yes    bool
	number int
}

// what is the value as the configuration file would have it.
func (v flagValue) what(kind flagKind) any {
	switch kind {
	case listFlag:
		list := make([]any, len(v.list))
		for i, s := range v.list {
			list[i] = s
		}
		return list
	case boolFlag:
		return v.yes
	case numberFlag:
		return int64(v.number)
	}
	return v.text
}

// setLabels reads NAME=VALUE.
func setLabels(labels *map[string]string, list []string) error {
	for _, l := range list {
		name, value, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("%q: want NAME=VALUE", l)
		}
		if *labels == nil {
			*labels = map[string]string{}
		}
		(*labels)[name] = value
	}
	return nil
}

// setWorker reads true, false or auto. The default is refused or not by the rules of the key.
func setWorker(enabled **bool, key, text string) error {
	if text == "" || strings.EqualFold(text, "auto") {
		return nil
	}
	b, err := strconv.ParseBool(text)
	if err != nil {
		return fmt.Errorf("%q: want true, false or auto", text)
	}
	*enabled = &b
	return config.Check(key, b)
}

func setRootless(c *config.Config, v flagValue) error {
	c.Worker.OCI.Rootless = v.yes
	return nil
}

// buildkitdPlaces are the default state directory, socket and configuration file of this user.
func buildkitdPlaces() (root, address, file string, err error) {
	if !ordinaryUser() {
		return buildkitdRoot, buildkitdAddress, filepath.Join("/etc", buildkitdConfig), nil
	}
	data, err := dataHome()
	if err != nil {
		return "", "", "", err
	}
	socket := filepath.Join(sharedRuntimeDir(), "buildkitd.sock")
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		socket = filepath.Join(dir, "buildkit", "buildkitd.sock")
	}
	return filepath.Join(data, "buildkit"), "unix://" + socket, filepath.Join(config.UserDir(), buildkitdConfig), nil
}

// buildkitdFlags are all of them; a test compares the list with buildkitd's own.
func buildkitdFlags() []buildkitdFlag {
	text := func(field func(*config.Config) *string) func(*config.Config, flagValue) error {
		return func(c *config.Config, v flagValue) error { *field(c) = v.text; return nil }
	}
	list := []buildkitdFlag{
		{name: "config", value: filepath.Join("/etc", buildkitdConfig), usage: "path to config file", env: "BUILDKITD_CONFIG"},
		{name: "debug", kind: boolFlag, usage: "enable debug output in logs", key: "debug", set: func(c *config.Config, v flagValue) error {
			if v.yes {
				c.Log.Level = "debug"
			}
			return nil
		}},
		{name: "trace", kind: boolFlag, usage: "enable trace output in logs", key: "trace", hidden: true, set: func(c *config.Config, v flagValue) error {
			if v.yes {
				c.Log.Level = "trace"
			}
			return nil
		}},
		{name: "root", value: buildkitdRoot, usage: "path to state directory", key: "root", set: text(func(c *config.Config) *string { return &c.Root })},
		{name: "addr", kind: listFlag, value: buildkitdAddress, usage: "listening address (socket or tcp)", key: "grpc.address", set: func(c *config.Config, v flagValue) error {
			c.GRPC.Address = v.list
			return nil
		}},
		{name: "log-format", value: "text", usage: "log formatter: json or text", key: "log.format", set: func(c *config.Config, v flagValue) error {
			if v.text != "text" && v.text != "json" && v.text != "" {
				return fmt.Errorf("%q is neither text nor json", v.text)
			}
			c.Log.Format = v.text
			return nil
		}},
		{name: "log-level", value: buildkitdLevel, usage: "set the log level", env: "BUILDKITD_LOG_LEVEL", key: "log.level", set: func(c *config.Config, v flagValue) error {
			c.Log.Level = v.text
			_, err := config.ParseLevel(v.text)
			return err
		}},
		{name: "group", usage: "group (name or gid) which will own all Unix socket listening addresses", key: "grpc.gid", set: func(c *config.Config, v flagValue) error {
			if v.text == "" {
				return nil
			}
			gid, err := groupID(v.text)
			c.GRPC.GID = &gid
			return err
		}},
		{name: "debugaddr", usage: "debugging address (eg. 0.0.0.0:6060)", env: "BUILDKITD_DEBUGADDR", key: "grpc.debugAddress", set: text(func(c *config.Config) *string { return &c.GRPC.DebugAddress })},
		{name: "tlscert", usage: "certificate file to use", key: "grpc.tls.cert", set: text(func(c *config.Config) *string { return &c.GRPC.TLS.Cert })},
		{name: "tlskey", usage: "key file to use", key: "grpc.tls.key", set: text(func(c *config.Config) *string { return &c.GRPC.TLS.Key })},
		{name: "tlscacert", usage: "ca certificate to verify clients", key: "grpc.tls.ca", set: text(func(c *config.Config) *string { return &c.GRPC.TLS.CA })},
		{name: "allow-insecure-entitlement", kind: listFlag, usage: "allows insecure entitlements e.g. network.host, security.insecure, device", key: "insecure-entitlements", set: func(c *config.Config, v flagValue) error {
			c.Entitlements = v.list
			return config.CheckEntitlements(v.list)
		}},
		{name: "proxy-network", kind: boolFlag, usage: "enable proxy network enforcement for all builds", key: "proxyNetwork"},
		{name: "otel-socket-path", usage: "OTEL collector trace socket path", key: "otel.socketPath", set: text(func(c *config.Config) *string { return &c.OTEL.SocketPath })},
		{name: "cdi-disabled", kind: boolFlag, usage: "disables support of the Container Device Interface (CDI)", key: "cdi.disabled", set: func(c *config.Config, v flagValue) error {
			c.CDI.Disabled = &v.yes
			return nil
		}},
		{name: "cdi-spec-dir", kind: listFlag, usage: "list of directories to scan for CDI spec files", key: "cdi.specDirs", set: func(c *config.Config, v flagValue) error {
			c.CDI.SpecDirs = v.list
			return nil
		}},
		{name: "save-cache-debug", kind: boolFlag, usage: "enable saving cache debug info"},
		{name: "rootless", kind: boolFlag, usage: "set all the default options to be compatible with rootless containers", key: "worker.oci.rootless", set: setRootless},

		{name: "oci-worker", value: "auto", usage: "enable oci workers (true/false/auto)", set: func(c *config.Config, v flagValue) error {
			return setWorker(&c.Worker.OCI.Enabled, "worker.oci.enabled", v.text)
		}},
		{name: "oci-worker-labels", kind: listFlag, usage: "user-specific annotation labels (com.example.foo=bar)", set: func(c *config.Config, v flagValue) error {
			return setLabels(&c.Worker.OCI.Labels, v.list)
		}},
		{name: "oci-worker-snapshotter", value: "auto", usage: "name of snapshotter (overlayfs, native, etc.)", key: "worker.oci.snapshotter"},
		{name: "oci-worker-proxy-snapshotter-path", usage: "address of proxy snapshotter socket (do not include 'unix://' prefix)", key: "worker.oci.proxySnapshotterPath"},
		{name: "oci-worker-platform", kind: listFlag, usage: "override supported platforms for worker", key: "worker.oci.platforms", set: func(c *config.Config, v flagValue) error {
			c.Worker.OCI.Platforms = v.list
			return nil
		}},
		{name: "oci-worker-net", value: "auto", usage: "worker network type (auto, bridge, cni or host)", key: "worker.oci.networkMode", set: text(func(c *config.Config) *string { return &c.Worker.OCI.NetworkMode })},
		{name: "oci-cni-config-path", value: "/etc/buildkit/cni.json", usage: "path of cni config file", key: "worker.oci.cniConfigPath"},
		{name: "oci-cni-binary-dir", value: "/opt/cni/bin", usage: "path of cni binary files", key: "worker.oci.cniBinaryPath"},
		{name: "oci-cni-pool-size", kind: numberFlag, value: "0", usage: "size of cni network namespace pool", key: "worker.oci.cniPoolSize", set: func(c *config.Config, v flagValue) error {
			c.Worker.OCI.NetworkPoolSize = v.number
			return notNegative(v.number)
		}},
		{name: "oci-worker-binary", usage: "name of specified oci worker binary", key: "worker.oci.binary"},
		{name: "oci-worker-apparmor-profile", usage: "set the name of the apparmor profile applied to containers", key: "worker.oci.apparmor-profile"},
		{name: "oci-worker-selinux", kind: boolFlag, usage: "apply SELinux labels", key: "worker.oci.selinux"},
		{name: "oci-max-parallelism", kind: numberFlag, value: "0", usage: "limit the number of parallel build steps that can run at the same time", key: "worker.oci.max-parallelism", set: func(c *config.Config, v flagValue) error {
			c.Worker.OCI.MaxParallelism = v.number
			return notNegative(v.number)
		}},
		{name: "oci-worker-rootless", kind: boolFlag, usage: "enable rootless mode", key: "worker.oci.rootless", set: setRootless},
		{name: "oci-worker-no-process-sandbox", kind: boolFlag, usage: "use the host PID namespace and procfs", key: "worker.oci.noProcessSandbox"},
		{name: "oci-worker-gc", kind: boolFlag, value: "true", usage: "Enable automatic garbage collection on worker", key: "worker.oci.gc", set: func(c *config.Config, v flagValue) error {
			c.Worker.OCI.GC = &v.yes
			return nil
		}},
		{name: "oci-worker-gc-keepstorage", usage: "Amount of storage GC keep locally, format \"Reserved[,Free[,Maximum]]\" (MB)", set: func(c *config.Config, v flagValue) error {
			if v.text == "" {
				return nil
			}
			return c.Worker.OCI.KeepStorage(v.text)
		}},

		{name: "containerd-worker", value: "auto", usage: "enable containerd workers (true/false/auto)", set: func(c *config.Config, v flagValue) error {
			return setWorker(&c.Worker.Containerd.Enabled, "worker.containerd.enabled", v.text)
		}},
	}
	// What belongs to the other worker, which cannot be enabled.
	for name, kind := range map[string]flagKind{
		"containerd-worker-addr": textFlag, "containerd-worker-labels": listFlag, "containerd-worker-platform": listFlag,
		"containerd-worker-namespace": textFlag, "containerd-worker-runtime": textFlag, "containerd-worker-net": textFlag,
		"containerd-cni-config-path": textFlag, "containerd-cni-binary-dir": textFlag, "containerd-cni-pool-size": numberFlag,
		"containerd-worker-snapshotter": textFlag, "containerd-worker-apparmor-profile": textFlag, "containerd-worker-selinux": boolFlag,
		"containerd-worker-hyperv-isolation": boolFlag, "containerd-max-parallelism": numberFlag, "containerd-worker-rootless": boolFlag,
		"containerd-worker-gc": boolFlag, "containerd-worker-gc-keepstorage": textFlag,
	} {
		list = append(list, buildkitdFlag{name: name, kind: kind, usage: "no effect: there is no containerd worker", set: func(c *config.Config, _ flagValue) error {
			c.Warnings = append(c.Warnings, "--"+name+" has no effect: the engine does not use containerd")
			return nil
		}})
	}
	return list
}

func notNegative(n int) error {
	if n < 0 {
		return fmt.Errorf("%d is negative", n)
	}
	return nil
}

// buildkitd runs the engine by buildkitd's command line, until a signal.
func (a *app) buildkitd(ctx context.Context, args []string) error {
	cmd := a.buildkitdCommand()
	cmd.SetArgs(longDashes(args))
	cmd.SetIn(a.in)
	cmd.SetOut(a.out)
	cmd.SetErr(a.err)
	return cmd.ExecuteContext(ctx)
}

// longDashes gives flags two dashes where one was given, which buildkitd takes too.
func longDashes(args []string) []string {
	out := make([]string, len(args))
	for i, arg := range args {
		if len(arg) > 2 && arg[0] == '-' && arg[1] != '-' {
			arg = "-" + arg
		}
		out[i] = arg
	}
	return out
}

func (a *app) buildkitdCommand() *cobra.Command {
	flags := buildkitdFlags()
	cmd := &cobra.Command{
		Use:           buildkitdName,
		Short:         "build daemon (slipway, with buildkitd's command line)",
		Version:       buildkitapi.BuildKitVersion,
		Args:          args(0, 0),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := buildkitdConfiguration(cmd.Flags(), flags)
			if err != nil {
				return err
			}
			return a.serveBuildkitd(cmd.Context(), &conf)
		},
	}
	// Tools take the version from the third of four fields.
	cmd.SetVersionTemplate(fmt.Sprintf("%s %s %s %s\n", buildkitdName, buildkitapi.Package, buildkitapi.BuildKitVersion, engine.Version))
	cmd.Flags().BoolP("version", "v", false, "print the version")
	cmd.Flags().SortFlags = false
	for _, f := range flags {
		switch f.kind {
		case textFlag:
			cmd.Flags().String(f.name, f.value, f.help())
		case listFlag:
			cmd.Flags().StringArray(f.name, nil, f.help())
		case boolFlag:
			cmd.Flags().Bool(f.name, f.value == "true", f.help())
		case numberFlag:
			cmd.Flags().Int(f.name, 0, f.help())
		}
		if f.hidden {
			_ = cmd.Flags().MarkHidden(f.name)
		}
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err, buildkitdName} })
	return cmd
}

func (f buildkitdFlag) help() string {
	text := f.usage
	if f.kind == listFlag && f.value != "" {
		text += " (default " + f.value + ")"
	}
	if f.env != "" {
		text += " [$" + f.env + "]"
	}
	return text
}

// buildkitdConfiguration is the configuration file with what the flags say instead.
func buildkitdConfiguration(given *pflag.FlagSet, flags []buildkitdFlag) (config.Config, error) {
	for _, f := range flags {
		if value, ok := os.LookupEnv(f.env); ok && f.env != "" && value != "" && !given.Changed(f.name) {
			if err := given.Set(f.name, value); err != nil {
				return config.Config{}, fmt.Errorf("$%s: %w", f.env, err)
			}
		}
	}
	root, address, path, err := buildkitdPlaces()
	if err != nil {
		return config.Config{}, err
	}
	if given.Changed("config") {
		if path, err = given.GetString("config"); err != nil {
			return config.Config{}, err
		}
	}
	conf, err := config.Load(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // buildkitd goes on without the file too
		return conf, err
	}
	for _, f := range flags {
		if !given.Changed(f.name) || f.name == "config" {
			continue
		}
		if err := f.apply(&conf, given); err != nil {
			return conf, fmt.Errorf("--%s: %w", f.name, err)
		}
	}
	if len(conf.GRPC.Address) == 0 {
		conf.GRPC.Address = []string{address}
	}
	if conf.Root == "" {
		conf.Root = root
	}
	if conf.Log.Level == "" && !conf.Debug && !conf.Trace {
		conf.Log.Level = buildkitdLevel
	}
	return conf, nil
}

// apply does what a flag that was given says.
func (f buildkitdFlag) apply(conf *config.Config, given *pflag.FlagSet) (err error) {
	var v flagValue
	switch f.kind {
	case textFlag:
		v.text, err = given.GetString(f.name)
	case listFlag:
		v.list, err = given.GetStringArray(f.name)
	case boolFlag:
		v.yes, err = given.GetBool(f.name)
	case numberFlag:
		v.number, err = given.GetInt(f.name)
	}
	if err != nil {
		return err
	}
	switch {
	case f.set != nil:
		return f.set(conf, v)
	case f.key != "":
		return config.Check(f.key, v.what(f.kind))
	case v.yes:
		return errors.New("not supported: see 'slipway explain' for what keys are made of")
	}
	return nil
}

// serveBuildkitd serves until a signal. Then nothing is left mounted: tools delete the state directory of a buildkitd.
func (a *app) serveBuildkitd(ctx context.Context, conf *config.Config) error {
	if err := a.settleLimits(); err != nil {
		return err
	}
	if needsNamespace() {
		return a.daemonInside(ctx)
	}
	options, err := engineOptions(conf)
	if err != nil {
		return err
	}
	a.limit(&options)
	if options.Root, err = filepath.Abs(conf.Root); err != nil {
		return err
	}
	if conf.GRPC.UID == nil {
		uid := os.Geteuid()
		conf.GRPC.UID = &uid
	}
	if conf.GRPC.GID == nil {
		gid := os.Getegid()
		conf.GRPC.GID = &gid
	}
	if options.Devices != nil {
		options.Entitlements = append(options.Entitlements, "device") // buildkitd lets every client ask for them
	}
	options.Log = io.Writer(a.err)
	return a.serve(ctx, conf, options, 0, true)
}
