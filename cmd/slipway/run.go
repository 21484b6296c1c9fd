// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/docker/cli/opts"
	"github.com/docker/go-connections/nat"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	mobyclient "github.com/moby/moby/client"
	mobysignal "github.com/moby/sys/signal"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// runOptions are the flags of `slipway run`, which are docker's.
type runOptions struct {
	remove, interactive, tty, detach, privileged, readOnly, init, publishAll, quiet bool

	name, workdir, user, entrypoint, network, hostname, pull, platform, stopSignal, cgroupParent string

	env, envFiles, labels, volumes, ports, expose, addHosts, dns, dnsSearch, dnsOptions, tmpfs, capAdd, capDrop, securityOpt, groupAdd []string

	mounts     opts.MountOpt
	ulimits    *opts.UlimitOpt
	cpus       opts.NanoCPUs
	memory     opts.MemBytes
	memorySwap opts.MemSwapBytes
	shmSize    opts.MemBytes
	cpuShares  int64
	cpusetCPUs string
	pidsLimit  int64

	// build is the directory of --build, and built the flags that say how.
	build string
	built buildOptions
}

// The exit codes of `slipway run` that are not the process's own; 126 and 127 come from the engine.
const exitRunFailed = 125

func newRunCommand(a *app) *cobra.Command {
	o := &runOptions{ulimits: opts.NewUlimitOpt(nil)}
	cmd := &cobra.Command{
		Use:               "run [OPTIONS] IMAGE [COMMAND] [ARG...]\n  slipway run [OPTIONS] --build DIR [--] [COMMAND] [ARG...]",
		ValidArgsFunction: a.offering(1, imageNames),
		Short:             "Run a command in a new container and wait for its end",
		Long: `Run a command in a new container and wait for its end. With --build the container is made of what a Dockerfile builds, without an
image in between: nothing is packed or named.

The exit code is the command's: 127 when it was not found, 126 when it could not be executed, 128+N after signal N,
and 125 when the container could not be run at all. Signals sent to this process go to the command.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			image := ""
			switch {
			case cmd.Flags().Changed("build"):
			case len(args) == 0:
				return &exitError{exitRunFailed, &usageError{errors.New("run needs an image, or --build DIR"), cmd.CommandPath()}}
			default:
				image, args = args[0], args[1:]
			}
			err := o.run(cmd.Context(), cmd.Flags(), a, image, args)
			var exit *exitError
			var interrupt *signalError
			if err == nil || errors.As(err, &exit) || errors.As(err, &interrupt) {
				return err
			}
			return &exitError{exitRunFailed, err}
		},
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &exitError{exitRunFailed, &usageError{err, cmd.CommandPath()}}
	})
	o.define(cmd.Flags())
	cmd.Flags().StringVar(&o.build, "build", "", "build DIR, a URL or - and run the result; these flags are as for 'slipway build':")
	o.built.addFlags(cmd.Flags())
	return cmd
}

// define adds the flags.
func (o *runOptions) define(flags *pflag.FlagSet) {
	flags.SetInterspersed(false) // what follows IMAGE is the container's
	flags.Bool("help", false, "help for run")
	flags.BoolVar(&o.remove, "rm", false, "remove the container and its anonymous volumes when it has ended")
	flags.BoolVarP(&o.interactive, "interactive", "i", false, "give the command our standard input")
	flags.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
	flags.BoolVarP(&o.detach, "detach", "d", false, "not supported yet")
	flags.StringArrayVarP(&o.env, "env", "e", nil, "set a variable, NAME=VALUE, or NAME to pass ours on")
	flags.StringArrayVar(&o.envFiles, "env-file", nil, "read variables from a file")
	flags.StringArrayVarP(&o.labels, "label", "l", nil, "set a label, NAME=VALUE")
	flags.StringArrayVarP(&o.volumes, "volume", "v", nil, "mount SOURCE:TARGET[:ro]; SOURCE is a path or the name of a volume")
	flags.Var(&o.mounts, "mount", "mount type=bind|volume|tmpfs,src=SOURCE,dst=TARGET[,readonly]")
	flags.StringArrayVar(&o.tmpfs, "tmpfs", nil, "mount a tmpfs, TARGET[:size=SIZE,mode=MODE]")
	flags.StringArrayVarP(&o.ports, "publish", "p", nil, "publish a port, [IP:]HOSTPORT:PORT[/udp]")
	flags.BoolVarP(&o.publishAll, "publish-all", "P", false, "publish all exposed ports on free ones")
	flags.StringArrayVar(&o.expose, "expose", nil, "declare a port, PORT[/udp]")
	flags.StringVarP(&o.workdir, "workdir", "w", "", "working directory in the container")
	flags.StringVarP(&o.user, "user", "u", "", "user, NAME|UID[:GROUP|GID]")
	flags.StringArrayVar(&o.groupAdd, "group-add", nil, "one more group for the command")
	flags.StringVar(&o.entrypoint, "entrypoint", "", "replace the image's ENTRYPOINT")
	flags.StringVar(&o.name, "name", "", "name of the container")
	flags.StringVar(&o.network, "network", "bridge", "network: bridge, host or none")
	flags.StringVar(&o.network, "net", "bridge", "")
	_ = flags.MarkHidden("net")
	flags.StringVarP(&o.hostname, "hostname", "h", "", "name of the host as the container sees it")
	flags.StringArrayVar(&o.addHosts, "add-host", nil, "add a line to /etc/hosts, HOST:IP")
	flags.StringArrayVar(&o.dns, "dns", nil, "ask this name server, an IP address, instead of the host's")
	flags.StringArrayVar(&o.dnsSearch, "dns-search", nil, "look names up in this domain too")
	flags.StringArrayVar(&o.dnsOptions, "dns-option", nil, "set an option of the resolver (ndots:2)")
	flags.BoolVar(&o.readOnly, "read-only", false, "mount the root file system read-only")
	flags.VarP(&o.memory, "memory", "m", "memory limit in bytes (512m, 2g)")
	flags.Var(&o.memorySwap, "memory-swap", "limit of memory and swap together; -1 for no limit")
	flags.Var(&o.shmSize, "shm-size", "size of /dev/shm")
	flags.Var(&o.cpus, "cpus", "number of CPUs (1.5)")
	flags.Int64VarP(&o.cpuShares, "cpu-shares", "c", 0, "relative weight of CPU time")
	flags.StringVar(&o.cpusetCPUs, "cpuset-cpus", "", "CPUs to run on (0-2, 0,1)")
	flags.Int64Var(&o.pidsLimit, "pids-limit", 0, "limit of processes; -1 for none")
	flags.Var(o.ulimits, "ulimit", "resource limit, NAME=SOFT[:HARD]")
	flags.StringArrayVar(&o.capAdd, "cap-add", nil, "add a capability")
	flags.StringArrayVar(&o.capDrop, "cap-drop", nil, "take a capability away")
	flags.StringArrayVar(&o.securityOpt, "security-opt", nil, "security option: seccomp=FILE|unconfined|builtin, no-new-privileges[=true|false],\napparmor=unconfined, label=disable")
	flags.BoolVar(&o.privileged, "privileged", false, "lift all confinement")
	flags.BoolVar(&o.init, "init", false, "put a small init in front of the command")
	flags.StringVar(&o.stopSignal, "stop-signal", "", "signal that stops the container")
	flags.StringVar(&o.cgroupParent, "cgroup-parent", "", "parent cgroup")
	flags.StringVar(&o.pull, "pull", "missing", "fetch the image: always, missing or never")
	flags.StringVar(&o.platform, "platform", "", "platform of the image, OS/ARCH[/VARIANT]")
	flags.BoolVarP(&o.quiet, "quiet", "q", false, "do not show the progress of fetching the image")
}

// request turns the flags into what the API wants.
func (o *runOptions) request(flags *pflag.FlagSet, image string, args []string) (mobyclient.ContainerCreateOptions, error) {
	var none mobyclient.ContainerCreateOptions
	config := &container.Config{
		Image: image, Cmd: args, Hostname: o.hostname, User: o.user, WorkingDir: o.workdir, Tty: o.tty, StopSignal: o.stopSignal,
		AttachStdout: true, AttachStderr: true,
		AttachStdin: o.interactive, OpenStdin: o.interactive, StdinOnce: o.interactive,
		Labels: map[string]string{}, Volumes: map[string]struct{}{}, ExposedPorts: network.PortSet{},
	}
	host := &container.HostConfig{
		AutoRemove: o.remove, NetworkMode: container.NetworkMode(o.network), Privileged: o.privileged, ReadonlyRootfs: o.readOnly,
		DNSSearch: o.dnsSearch, DNSOptions: o.dnsOptions,
		PublishAllPorts: o.publishAll, CapAdd: o.capAdd, CapDrop: o.capDrop, GroupAdd: o.groupAdd,
		ShmSize: o.shmSize.Value(), Mounts: o.mounts.Value(), PortBindings: network.PortMap{}, Tmpfs: map[string]string{},
	}
	host.Resources = container.Resources{
		Memory: o.memory.Value(), MemorySwap: o.memorySwap.Value(), NanoCPUs: o.cpus.Value(), CPUShares: o.cpuShares,
		CpusetCpus: o.cpusetCPUs, Ulimits: o.ulimits.GetList(), CgroupParent: o.cgroupParent,
	}
	if flags.Changed("pids-limit") {
		host.PidsLimit = &o.pidsLimit
	}
	if o.init {
		host.Init = &o.init
	}
	if flags.Changed("entrypoint") {
		config.Entrypoint = []string{o.entrypoint} // "" means none
	}
	var err error
	if config.Env, err = o.environment(); err != nil {
		return none, err
	}
	if host.SecurityOpt, err = securityOptions(o.securityOpt); err != nil {
		return none, err
	}
	for _, l := range o.labels {
		name, value, _ := strings.Cut(l, "=")
		if name == "" {
			return none, fmt.Errorf("--label %q: want NAME=VALUE", l)
		}
		config.Labels[name] = value
	}
	for _, v := range o.volumes {
		source, rest, ok := strings.Cut(v, ":")
		if !ok {
			if !filepath.IsAbs(v) {
				return none, fmt.Errorf("--volume %q: want SOURCE:TARGET[:ro], or an absolute path in the container", v)
			}
			config.Volumes[v] = struct{}{}
			continue
		}
		if strings.HasPrefix(source, ".") {
			if source, err = filepath.Abs(source); err != nil {
				return none, fmt.Errorf("--volume %q: %w", v, err)
			}
		}
		host.Binds = append(host.Binds, source+":"+rest)
	}
	for _, t := range o.tmpfs {
		target, options, _ := strings.Cut(t, ":")
		host.Tmpfs[target] = options
	}
	for _, h := range o.addHosts {
		entry, err := opts.ValidateExtraHost(h)
		if err != nil {
			return none, fmt.Errorf("--add-host %q: want HOST:IP: %w", h, err)
		}
		host.ExtraHosts = append(host.ExtraHosts, entry)
	}
	for _, server := range o.dns {
		addr, err := netip.ParseAddr(server)
		if err != nil {
			return none, fmt.Errorf("--dns %q: want an IP address", server)
		}
		host.DNS = append(host.DNS, addr)
	}
	if err := parsePorts(o.ports, o.expose, config, host); err != nil {
		return none, err
	}
	req := mobyclient.ContainerCreateOptions{Config: config, HostConfig: host, Name: o.name}
	if o.platform != "" {
		p, err := platforms.Parse(o.platform)
		if err != nil {
			return none, fmt.Errorf("--platform %q: %w", o.platform, err)
		}
		req.Platform = &ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}
	}
	return req, nil
}

// securityOptions puts the content of a seccomp profile in the place of its file's name, as docker's client does: the engine may be
// on another host.
func securityOptions(options []string) ([]string, error) {
	out := slices.Clone(options)
	for i, option := range out {
		file, ok := strings.CutPrefix(option, "seccomp=")
		if !ok || file == "unconfined" || file == "builtin" {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("--security-opt seccomp=FILE: %w", err)
		}
		var profile bytes.Buffer
		if err := json.Compact(&profile, b); err != nil {
			return nil, fmt.Errorf("--security-opt seccomp=%s: not JSON: %w", file, err)
		}
		out[i] = "seccomp=" + profile.String()
	}
	return out, nil
}

// environment puts --env on top of --env-file. A name alone passes our variable on, if we have it.
func (o *runOptions) environment() ([]string, error) {
	var own []string
	for _, e := range o.env {
		name, _, set := strings.Cut(e, "=")
		if name == "" {
			return nil, fmt.Errorf("--env %q: want NAME=VALUE or NAME", e)
		}
		if !set {
			value, ok := os.LookupEnv(name)
			if !ok {
				own = append(own, e) // takes the image's variable away
				continue
			}
			e = name + "=" + value
		}
		own = append(own, e)
	}
	env, err := opts.ReadKVEnvStrings(o.envFiles, own)
	if err != nil {
		return nil, fmt.Errorf("--env-file: %w", err)
	}
	return env, nil
}

// parsePorts reads --publish and --expose.
func parsePorts(publish, expose []string, config *container.Config, host *container.HostConfig) error {
	for _, text := range publish {
		mappings, err := nat.ParsePortSpec(text)
		if err != nil {
			return fmt.Errorf("--publish %q: want [IP:]HOSTPORT:PORT[/udp]: %w", text, err)
		}
		for _, m := range mappings {
			port, err := network.ParsePort(string(m.Port))
			if err != nil {
				return fmt.Errorf("--publish %q: %w", text, err)
			}
			b := network.PortBinding{HostPort: m.Binding.HostPort}
			if m.Binding.HostIP != "" {
				if b.HostIP, err = netip.ParseAddr(m.Binding.HostIP); err != nil {
					return fmt.Errorf("--publish %q: %w", text, err)
				}
			}
			config.ExposedPorts[port] = struct{}{}
			host.PortBindings[port] = append(host.PortBindings[port], b)
		}
	}
	for _, text := range expose {
		ports, err := network.ParsePortRange(text)
		if err != nil {
			return fmt.Errorf("--expose %q: %w", text, err)
		}
		for port := range ports.All() {
			config.ExposedPorts[port] = struct{}{}
		}
	}
	return nil
}

func (o *runOptions) run(ctx context.Context, flags *pflag.FlagSet, a *app, image string, args []string) error {
	if o.detach {
		return errors.New("not supported yet: --detach (containers run in the foreground for now)")
	}
	switch o.pull {
	case "always", "missing", "never":
	default:
		return fmt.Errorf("--pull %q: want always, missing or never", o.pull)
	}
	req, err := o.request(flags, image, args)
	if err != nil {
		return err
	}
	if err := o.checkBuild(flags); err != nil {
		return err
	}
	inFD, inTTY := terminal(a.in)
	outFD, outTTY := terminal(a.out)
	if o.tty && o.interactive && !inTTY {
		return errors.New("the input device is not a TTY: leave out --tty")
	}
	if o.tty && outTTY {
		if cols, rows, err := term.GetSize(outFD); err == nil {
			req.HostConfig.ConsoleSize = [2]uint{uint(rows), uint(cols)}
		}
	}
	if flags.Changed("build") {
		if req.Config.Image, err = o.buildSnapshot(ctx, a); err != nil {
			return err
		}
		o.pull = "never"
	}
	cli, err := a.docker(ctx)
	if err != nil {
		return err
	}
	id, err := o.create(ctx, a, cli, req)
	if err != nil {
		return interrupted(ctx, err)
	}

	// From here on signals are for the command; they only end us by ending it.
	r := &foreground{a: a, cli: cli, id: id, options: o, size: req.HostConfig.ConsoleSize}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	if ctx.Err() != nil {
		r.discard()
		return context.Cause(ctx)
	}
	if o.tty && o.interactive {
		state, err := term.MakeRaw(inFD)
		if err != nil {
			r.discard()
			return fmt.Errorf("switch the terminal to raw mode: %w", err)
		}
		defer term.Restore(inFD, state)
	}
	if o.tty && outTTY {
		r.terminal = outFD
	} else {
		r.terminal = -1
	}
	return r.run(context.WithoutCancel(ctx), signals)
}

// create makes the container, and fetches the image as --pull says.
func (o *runOptions) create(ctx context.Context, a *app, cli *mobyclient.Client, req mobyclient.ContainerCreateOptions) (string, error) {
	fetch := func() error {
		progress := a.err
		if o.quiet {
			progress = io.Discard
		}
		_, err := pullImage(ctx, cli, req.Config.Image, o.platform, progress)
		return err
	}
	if o.pull == "always" {
		if err := fetch(); err != nil {
			return "", err
		}
	}
	res, err := cli.ContainerCreate(ctx, req)
	if isNotFound(err) && o.pull == "missing" && strings.Contains(err.Error(), "No such image") {
		if !o.quiet {
			fmt.Fprintf(a.err, "Unable to find image '%s' locally\n", req.Config.Image)
		}
		if err := fetch(); err != nil {
			return "", err
		}
		res, err = cli.ContainerCreate(ctx, req)
	}
	if err != nil {
		return "", apiError(err)
	}
	for _, w := range res.Warnings {
		fmt.Fprintln(a.err, "WARNING:", w)
	}
	return res.ID, nil
}

// foreground is a container that we are attached to.
type foreground struct {
	a        *app
	cli      *mobyclient.Client
	id       string
	options  *runOptions
	terminal int // file descriptor whose size the container follows, -1 for none
	size     [2]uint
}

// discard removes a container that was not started.
func (r *foreground) discard() {
	_, _ = r.cli.ContainerRemove(context.Background(), r.id, mobyclient.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
}

// run starts the container and stays until it has ended.
func (r *foreground) run(ctx context.Context, signals <-chan os.Signal) error {
	o := r.options
	conn, err := r.cli.ContainerAttach(ctx, r.id, mobyclient.ContainerAttachOptions{Stream: true, Stdin: o.interactive, Stdout: true, Stderr: true})
	if err != nil {
		r.discard()
		return apiError(err)
	}
	defer conn.Close()
	condition := container.WaitConditionNextExit
	if o.remove {
		condition = container.WaitConditionRemoved
	}
	// Waiting begins before the start: a short command would end unseen otherwise.
	waitCtx, stopWaiting := context.WithCancel(ctx)
	defer stopWaiting()
	wait := r.cli.ContainerWait(waitCtx, r.id, mobyclient.ContainerWaitOptions{Condition: condition})

	output := make(chan error, 1)
	go func() {
		var err error
		if o.tty {
			_, err = io.Copy(r.a.out, conn.Reader)
		} else {
			_, err = stdcopy.StdCopy(r.a.out, r.a.err, conn.Reader)
		}
		output <- err
	}()

	if _, err := r.cli.ContainerStart(ctx, r.id, mobyclient.ContainerStartOptions{}); err != nil {
		return &exitError{r.startCode(ctx, wait), apiError(err)}
	}
	if o.interactive {
		go func() {
			_, _ = io.Copy(conn.Conn, r.a.in)
			_ = conn.CloseWrite()
		}()
	}
	r.resize(ctx) // it may have changed since it was created

	interrupts := 0
	for {
		select {
		case sig := <-signals:
			switch sig := sig.(syscall.Signal); sig {
			case syscall.SIGPIPE: // the write that failed says so itself
			case syscall.SIGWINCH:
				r.resize(ctx)
			case syscall.SIGINT:
				// The first process of a container ignores what it does not handle; somebody at a keyboard must get out.
				if interrupts++; interrupts >= 3 {
					fmt.Fprintln(r.a.err, "slipway: interrupted three times: killing the container")
					sig = syscall.SIGKILL
				}
				r.kill(ctx, sig)
			default:
				r.kill(ctx, sig)
			}
		case err := <-output:
			if err != nil {
				// Nobody reads what the command writes (our reader is gone): end it, as the signal would have ended it.
				r.kill(ctx, syscall.SIGKILL)
				conn.Close() // the engine must not wait for us to read the rest
				select {
				case <-wait.Result:
				case <-wait.Error:
				}
				return &exitError{128 + int(syscall.SIGPIPE), nil}
			}
			output = nil // the end; the status follows
		case res := <-wait.Result:
			if output != nil {
				<-output
			}
			if res.Error != nil && res.Error.Message != "" {
				return errors.New(res.Error.Message)
			}
			if res.StatusCode != 0 {
				r.explain(ctx)
				return &exitError{int(res.StatusCode), nil}
			}
			return nil
		case err := <-wait.Error:
			return fmt.Errorf("wait for container %s: %w", shortID(r.id), apiError(err))
		}
	}
}

// explain says so when the container has ended for lack of memory.
func (r *foreground) explain(ctx context.Context) {
	res, err := r.cli.ContainerInspect(ctx, r.id, mobyclient.ContainerInspectOptions{})
	if err != nil || res.Container.State == nil || !res.Container.State.OOMKilled {
		return
	}
	limit := ""
	if r.options.memory > 0 {
		limit = fmt.Sprintf(", which may use %s (--memory)", units.BytesSize(float64(r.options.memory)))
	}
	fmt.Fprintf(r.a.err, "slipway: out of memory: the kernel killed a process of the container%s\n", limit)
}

// startCode is the exit code of a container that did not start.
func (r *foreground) startCode(ctx context.Context, wait mobyclient.ContainerWaitResult) int {
	code := int64(exitRunFailed)
	select {
	case res := <-wait.Result:
		code = res.StatusCode
	case <-wait.Error:
	}
	if code == 126 || code == 127 {
		return int(code)
	}
	return exitRunFailed
}

// kill passes a signal on. The command may have ended meanwhile.
func (r *foreground) kill(ctx context.Context, sig syscall.Signal) {
	name := unix.SignalName(sig)
	if name == "" {
		name = fmt.Sprint(int(sig))
	}
	_, err := r.cli.ContainerKill(ctx, r.id, mobyclient.ContainerKillOptions{Signal: name})
	if err != nil && r.a.debug {
		fmt.Fprintf(r.a.err, "slipway: signal %s: %v\n", name, apiError(err))
	}
}

// resize gives the container's terminal the size of ours.
func (r *foreground) resize(ctx context.Context) {
	if r.terminal < 0 {
		return
	}
	cols, rows, err := term.GetSize(r.terminal)
	if err != nil || r.size == [2]uint{uint(rows), uint(cols)} {
		return
	}
	r.size = [2]uint{uint(rows), uint(cols)}
	_, err = r.cli.ContainerResize(ctx, r.id, mobyclient.ContainerResizeOptions{Height: uint(rows), Width: uint(cols)})
	if err != nil && r.a.debug {
		fmt.Fprintf(r.a.err, "slipway: resize: %v\n", apiError(err))
	}
}

// forwarded are the signals that are not about ourselves: not our children, our runtime and our place in the shell's
// jobs. SIGPIPE is among them so that a write to a closed pipe fails instead of killing us with the container alive.
var forwarded = func() []os.Signal {
	var out []os.Signal
	for _, sig := range mobysignal.SignalMap {
		switch sig {
		case syscall.SIGCHLD, syscall.SIGURG, syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU,
			syscall.SIGCONT, syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGABRT, syscall.SIGTRAP, syscall.SIGSYS:
			continue
		}
		out = append(out, sig)
	}
	return out
}()
