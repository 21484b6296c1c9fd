// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/seed-68981b69/slipway/cache"
	"github.com/seed-68981b69/slipway/engine/buildkitapi"
)

// debugOptions are the flags of debug.
type debugOptions struct {
	secrets, ssh, env []string
	before            bool
}

func newDebugCommand(a *app) *cobra.Command {
	var o debugOptions
	var last bool
	cmd := &cobra.Command{
		Use:   "debug [flags] [BUILD | --last] [-- COMMAND [ARG...]]",
		Short: "Open a shell in the file system that a failed RUN has left",
		Long: `Open a shell, or run a command, in the file system as the failed command of a build left it: with its environment,
user, working directory, mounts and network. What is changed there is gone afterwards, cache mounts excepted.

The files are kept for a day. Secrets are not: give them again with --secret.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var command []string
			if n := cmd.ArgsLenAtDash(); n >= 0 {
				args, command = args[:n], args[n:]
				if len(command) == 0 {
					return &usageError{errors.New("no command after --"), cmd.CommandPath()}
				}
			}
			if len(args) > 1 {
				return &usageError{errors.New("one build at most; a command comes after --"), cmd.CommandPath()}
			}
			ref, err := buildRef(args, last)
			if err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			return a.debugBuild(cmd.Context(), o, ref, command)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&last, "last", false, "the newest build that has failed (the default)")
	f.BoolVar(&o.before, "before", false, "the files as they were before the command")
	f.StringArrayVar(&o.secrets, "secret", nil, "give a secret that the step had: id=ID[,src=FILE|,env=NAME]")
	f.StringArrayVar(&o.ssh, "ssh", nil, "give an SSH agent or keys that the step had: default|ID[=SOCKET|KEY[,KEY]]")
	f.StringArrayVarP(&o.env, "env", "e", nil, "set a variable, NAME=VALUE, or NAME to pass ours on")
	return cmd
}

// debugBuild opens a shell in what a build of the history has left.
func (a *app) debugBuild(ctx context.Context, o debugOptions, ref string, command []string) error {
	client, err := a.buildkit(ctx)
	if err != nil {
		return err
	}
	var rec *controlapi.BuildHistoryRecord
	if ref == "" {
		rec, err = lastFailed(ctx, client)
	} else {
		rec, err = findBuild(ctx, client, ref)
	}
	if err != nil {
		return err
	}
	d, err := newDebugger(a, client, o, rec)
	if err != nil {
		return err
	}
	return d.run(ctx, command)
}

// lastFailed finds the newest build that has failed.
func lastFailed(ctx context.Context, client *bkclient.Client) (*controlapi.BuildHistoryRecord, error) {
	stream, err := client.ControlClient().ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{EarlyExit: true})
	if err != nil {
		return nil, err
	}
	builds := 0
	for {
		event, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && builds == 0:
			return nil, errors.New("there is nothing to debug: there is no build yet")
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("there is nothing to debug: no build has failed, of the %s that the history has", count(builds, "build"))
		case err != nil:
			return nil, err
		case event.Type != controlapi.BuildHistoryEventType_COMPLETE:
			continue
		case event.Record.Error != nil && !wasCanceled(event.Record):
			return event.Record, nil
		}
		builds++
	}
}

func wasCanceled(rec *controlapi.BuildHistoryRecord) bool {
	return buildkitapi.FailedStep(rec.Error) == nil && strings.Contains(rec.Error.GetMessage(), context.Canceled.Error())
}

// debugger opens shells in what a failed step has left.
type debugger struct {
	a       *app
	client  *bkclient.Client
	options debugOptions
	step    *errdefs.Solve
	// failure says why the step failed, build which build it was of.
	failure, build string
}

// newDebugger says why there is nothing to debug, if so.
func newDebugger(a *app, client *bkclient.Client, o debugOptions, rec *controlapi.BuildHistoryRecord) (*debugger, error) {
	step := buildkitapi.FailedStep(rec.Error)
	switch {
	case rec.Error == nil:
		return nil, fmt.Errorf("there is nothing to debug: build %s has not failed", rec.Ref)
	case wasCanceled(rec):
		return nil, fmt.Errorf("there is nothing to debug: build %s was canceled", rec.Ref)
	case step == nil:
		return nil, fmt.Errorf("there is nothing to debug: build %s has failed without running a command that failed: %s", rec.Ref, rec.Error.Message)
	case step.GetOp().GetExec() == nil:
		age := time.Since(rec.CompletedAt.AsTime())
		why := "they were deleted to make room"
		if age > cache.FailedStepsFor {
			why = fmt.Sprintf("the build failed %v ago, and files are kept for %v", age.Round(time.Minute), cache.FailedStepsFor)
		}
		return nil, fmt.Errorf("there is nothing to debug: the files of build %s are not kept any more (%s): build again", rec.Ref, why)
	}
	return &debugger{a: a, client: client, options: o, step: step, failure: rec.Error.Message, build: rec.Ref}, nil
}

// debugError opens a shell in what the failed step of a build that we have just run has left, as --debug-on-error wants.
func (a *app) debugError(ctx context.Context, client *bkclient.Client, o buildOptions, ref string, err error) error {
	var failed *errdefs.SolveError
	if !errors.As(err, &failed) || failed.GetOp().GetExec() == nil || len(failed.MountIDs) != len(failed.Op.GetExec().Mounts) {
		return errors.New("--debug-on-error: there is nothing to look at: no command of the build has failed")
	}
	d := &debugger{a: a, client: client, options: debugOptions{secrets: o.secrets, ssh: o.ssh}, step: failed.Solve, failure: failed.Err.Error(), build: ref}
	return d.run(ctx, nil)
}

func (d *debugger) exec() *pb.ExecOp { return d.step.Op.GetExec() }

// mounts are those of the step. Secrets and agents that are not given are left out; missing says which.
func (d *debugger) mounts() (mounts []gwclient.Mount, missing []string) {
	ids := d.step.MountIDs
	if d.options.before {
		ids = d.step.InputIDs
	}
	for i, m := range d.exec().Mounts {
		switch {
		case m.MountType == pb.MountType_SECRET && !given(d.options.secrets, m.SecretOpt.GetID()):
			missing = append(missing, "--secret id="+m.SecretOpt.GetID())
			continue
		case m.MountType == pb.MountType_SSH && !givenSSH(d.options.ssh, m.SSHOpt.GetID()):
			missing = append(missing, "--ssh "+m.SSHOpt.GetID())
			continue
		}
		dest := m.Dest
		if !path.IsAbs(dest) {
			dest = path.Join("/", d.exec().Meta.Cwd, dest)
		}
		mount := gwclient.Mount{
			Selector: m.Selector, Dest: dest, Readonly: m.Readonly, MountType: m.MountType,
			CacheOpt: m.CacheOpt, SecretOpt: m.SecretOpt, SSHOpt: m.SSHOpt,
		}
		if i < len(ids) {
			mount.ResultID = ids[i]
		}
		mounts = append(mounts, mount)
	}
	return mounts, missing
}

// given says whether one of the --secret flags has an ID.
func given(specs []string, id string) bool {
	return slices.ContainsFunc(specs, func(spec string) bool {
		fields, err := parseCSV(spec, "--secret")
		return err == nil && fields["id"] == id
	})
}

func givenSSH(specs []string, id string) bool {
	return slices.ContainsFunc(specs, func(spec string) bool {
		name, _, _ := strings.Cut(spec, "=")
		return name == id
	})
}

// environment is the step's, with what the user adds.
func (d *debugger) environment(tty bool) (env []string, secrets []*pb.SecretEnv, missing []string, err error) {
	meta := d.exec().Meta
	env = slices.Clone(meta.Env)
	set := func(name, value string) {
		env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
		env = append(env, name+"="+value)
	}
	if p := meta.ProxyEnv; p != nil {
		for name, value := range map[string]string{
			"HTTP_PROXY": p.HttpProxy, "HTTPS_PROXY": p.HttpsProxy, "FTP_PROXY": p.FtpProxy, "NO_PROXY": p.NoProxy, "ALL_PROXY": p.AllProxy,
		} {
			if value != "" {
				set(name, value)
				set(strings.ToLower(name), value)
			}
		}
	}
	if term := os.Getenv("TERM"); tty && term != "" {
		set("TERM", term)
	}
	for _, e := range d.options.env {
		name, value, ok := strings.Cut(e, "=")
		if name == "" {
			return nil, nil, nil, fmt.Errorf("--env %q: want NAME=VALUE or NAME", e)
		}
		if !ok {
			if value, ok = os.LookupEnv(name); !ok {
				continue
			}
		}
		set(name, value)
	}
	for _, se := range d.exec().Secretenv {
		if given(d.options.secrets, se.ID) {
			secrets = append(secrets, se)
		} else {
			missing = append(missing, "--secret id="+se.ID)
		}
	}
	return env, secrets, missing, nil
}

// run opens the shell, or runs command, and ends with its exit code.
func (d *debugger) run(ctx context.Context, command []string) error {
	inFD, inTTY := terminal(d.a.in)
	outFD, outTTY := terminal(d.a.out)
	tty := inTTY && outTTY
	mounts, missing := d.mounts()
	env, secrets, more, err := d.environment(tty)
	if err != nil {
		return err
	}
	missing = append(missing, more...)
	slices.Sort(missing)
	solve := bkclient.SolveOpt{Internal: true, Ref: identity.NewID(), AllowedEntitlements: d.entitlements()}
	if solve.Session, err = d.session(); err != nil {
		return err
	}
	size := -1
	if tty {
		size = outFD
	}
	var own error // as it was, without what the way through the engine adds
	_, err = d.client.Build(ctx, solve, "slipway", func(ctx context.Context, c gwclient.Client) (_ *gwclient.Result, err error) {
		defer func() { own = err }()
		exec := d.exec()
		ctr, err := c.NewContainer(ctx, gwclient.NewContainerRequest{
			Mounts: mounts, NetMode: exec.Network, Platform: d.step.Op.Platform, ExtraHosts: exec.Meta.ExtraHosts, Hostname: exec.Meta.Hostname,
		})
		if err != nil {
			return nil, err
		}
		defer ctr.Release(context.WithoutCancel(ctx))
		args := command
		if len(args) == 0 {
			shell, err := d.shell(ctx, ctr, mounts)
			if err != nil {
				return nil, err
			}
			args = []string{shell}
		}
		d.banner(args, missing)
		proc, err := ctr.Start(ctx, gwclient.StartRequest{
			Args: args, Env: env, SecretEnv: secrets, User: exec.Meta.User, Cwd: exec.Meta.Cwd, Tty: tty, SecurityMode: exec.Security,
			Stdin: io.NopCloser(d.a.in), Stdout: nopCloser{d.a.stdout()}, Stderr: nopCloser{d.a.stderr()},
		})
		if err != nil {
			return nil, err
		}
		if tty {
			state, err := term.MakeRaw(inFD)
			if err != nil {
				return nil, fmt.Errorf("switch the terminal to raw mode: %w", err)
			}
			defer term.Restore(inFD, state)
		}
		defer followSize(ctx, proc, size)()
		return gwclient.NewResult(), proc.Wait()
	}, nil)
	if own != nil {
		err = own
	}
	var exit *gwpb.ExitError
	if errors.As(err, &exit) {
		if exit.ExitCode == 126 || exit.ExitCode == 127 {
			if len(command) > 0 && exit.Err != nil {
				fmt.Fprintf(d.a.stderr(), "slipway: %s\n", message(exit.Err))
			}
		}
		return &exitError{int(exit.ExitCode), nil}
	}
	var interrupted *signalError
	if err != nil && errors.As(context.Cause(ctx), &interrupted) {
		return interrupted
	}
	return err
}

// entitlements are those that the step had needed; the engine must still permit them.
func (d *debugger) entitlements() []string {
	var list []string
	if d.exec().Network == pb.NetMode_HOST {
		list = append(list, "network.host")
	}
	if d.exec().Security == pb.SecurityMode_INSECURE {
		list = append(list, "security.insecure")
	}
	return list
}

func (d *debugger) session() ([]session.Attachable, error) {
	var list []session.Attachable
	if len(d.options.secrets) > 0 {
		provider, err := secretProvider(d.options.secrets)
		if err != nil {
			return nil, err
		}
		list = append(list, provider)
	}
	if len(d.options.ssh) > 0 {
		provider, err := sshProvider(d.options.ssh)
		if err != nil {
			return nil, err
		}
		list = append(list, provider)
	}
	return list, nil
}

// shells are looked for in this order, after the step's own.
var shells = []string{"/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh", "/bin/ash", "/busybox/sh"}

// shell finds one in the root.
func (d *debugger) shell(ctx context.Context, ctr gwclient.Container, mounts []gwclient.Mount) (string, error) {
	candidates := shells
	if args := d.exec().Meta.Args; len(args) > 0 && path.IsAbs(args[0]) && strings.HasSuffix(args[0], "sh") && path.Base(args[0]) != "sh" {
		candidates = append([]string{args[0]}, shells...)
	}
	root := slices.IndexFunc(mounts, func(m gwclient.Mount) bool { return m.Dest == pb.RootMount })
	for _, shell := range candidates {
		if _, err := ctr.StatFile(ctx, gwclient.StatContainerRequest{StatRequest: gwclient.StatRequest{Path: shell}, MountIndex: root}); err == nil {
			return shell, nil
		}
	}
	return "", fmt.Errorf("there is no shell in the failed step's file system (looked for %s): give a command after --", strings.Join(candidates, ", "))
}

// banner says where one is, and how to run the command again.
func (d *debugger) banner(args, missing []string) {
	w := d.a.stderr()
	files := "as the failed command left them"
	if d.options.before {
		files = "as they were before the failed command"
	}
	meta := d.exec().Meta
	fmt.Fprintf(w, "-- debugging %s\n", d.stepName())
	why := d.failure
	if i := strings.LastIndex(why, d.stepName()+": "); i >= 0 {
		why = why[i+len(d.stepName())+2:]
	}
	fmt.Fprintf(w, "   why:     %s\n", strings.ReplaceAll(strings.TrimSpace(why), "\n", "\n            "))
	fmt.Fprintf(w, "   files:   %s; what you change is gone at the end, cache mounts excepted\n", files)
	if until, err := time.Parse(time.RFC3339, d.step.Description[buildkitapi.DescriptionUntil]); err == nil {
		fmt.Fprintf(w, "   kept:    until %s at the latest (slipway debug %s)\n", until.Local().Format("2006-01-02 15:04"), d.build)
	} else {
		fmt.Fprintf(w, "   later:   slipway debug %s\n", d.build)
	}
	if len(missing) > 0 {
		fmt.Fprintf(w, "   missing: what is never kept: give %s\n", strings.Join(slices.Compact(missing), ", "))
	}
	fmt.Fprintf(w, "   here:    %s in %s\n", shellQuote(args), path.Join("/", meta.Cwd))
	fmt.Fprintf(w, "   again:   %s\n", shellQuote(meta.Args))
}

// stepName is what the progress called the step.
func (d *debugger) stepName() string {
	if name := d.step.Description[buildkitapi.DescriptionName]; name != "" {
		return name
	}
	return shellQuote(d.exec().Meta.Args)
}

var plainWord = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`) })

// shellQuote writes args so that a shell reads the same.
func shellQuote(args []string) string {
	words := make([]string, len(args))
	for i, arg := range args {
		if words[i] = arg; !plainWord().MatchString(arg) {
			words[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}

// followSize gives a process the size of our terminal, now and when it changes, until the function it returns is called; fd -1 is
// no terminal.
func followSize(ctx context.Context, proc gwclient.ContainerProcess, fd int) (stop func()) {
	if fd < 0 {
		return func() {}
	}
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if cols, rows, err := term.GetSize(fd); err == nil {
				_ = proc.Resize(ctx, gwclient.WinSize{Rows: uint32(rows), Cols: uint32(cols)})
			}
			select {
			case <-changes:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		signal.Stop(changes)
		cancel(nil)
		<-ended
	}
}
