// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/buildkit/util/stack"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	"github.com/seed-68981b69/slipway/engine"
	"github.com/seed-68981b69/slipway/executor/userns"
)

// command is one command: its name, and what makes it with all of its flags.
type command struct {
	name string
	make func(*app) *cobra.Command
}

// commands lists every command; each has a file of its own.
func commands() []command {
	return []command{
		{"build", newBuildCommand},
		{"run", newRunCommand},
		{"push", newPushCommand},
		{"pull", newPullCommand},
		{"copy", newCopyCommand},
		{"save", newSaveCommand},
		{"load", newLoadCommand},
		{"manifest", newManifestCommand},
		{"images", newImagesCommand},
		{"inspect", newInspectCommand},
		{"history", newHistoryCommand},
		{"explain", newExplainCommand},
		{"logs", newLogsCommand},
		{"debug", newDebugCommand},
		{"tag", newTagCommand},
		{"rmi", newRmiCommand},
		{"ps", newPsCommand},
		{"rm", newRmCommand},
		{"login", newLoginCommand},
		{"logout", newLogoutCommand},
		{"cache", newCacheCommand},
		{"info", newInfoCommand},
		{"version", newVersionCommand},
		{"daemon", newDaemonCommand},
	}
}

// makeCommands makes the commands that args can mean, or all where none is named (help, completion, mistakes): the flags of all
// take a millisecond of every call.
func makeCommands(a *app, args []string) []*cobra.Command {
	var named, all []*cobra.Command
	for _, c := range commands() {
		if slices.Contains(args, c.name) {
			named = append(named, c.make(a))
		}
	}
	if len(named) > 0 && !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, cobra.ShellCompRequestCmd) }) {
		return named
	}
	for _, c := range commands() {
		all = append(all, c.make(a))
	}
	return all
}

// exitError ends the program with a code of its own. A nil err ends it without a message.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return "exit status " + strconv.Itoa(e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError is a mistake in the command line.
type usageError struct {
	err     error
	command string
}

func (e *usageError) Error() string {
	return fmt.Sprintf("%v (see '%s --help')", e.err, e.command)
}

func (e *usageError) Unwrap() error { return e.err }

// Main runs the program on os.Args and the standard streams and returns its exit code.
func Main() int {
	if err := userns.Enter(); err != nil {
		fmt.Fprintf(os.Stderr, "slipway: %v\n", err)
		return 1
	}
	log.SetOutput(io.Discard)          // the HTTP/2 library reports broken connections there, which come with an error anyway
	logrus.SetLevel(logrus.ErrorLevel) // as containerd's libraries do there with what they would like the file system to have
	ctx, stop := signalContext(context.Background())
	defer stop()
	a := newApp(os.Stdin, os.Stdout, os.Stderr)
	if filepath.Base(os.Args[0]) == buildkitdName {
		a.program = buildkitdName
		return a.report(a.buildkitd(ctx, os.Args[1:]))
	}
	err := a.run(ctx, os.Args[1:])
	return a.report(err)
}

// signalContext returns a context that ends at the first SIGINT or SIGTERM; the second one kills the program, as it
// would without a handler.
func signalContext(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case sig := <-signals:
			cancel(&signalError{sig.(syscall.Signal)})
			signal.Stop(signals)
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(context.Canceled)
	}
}

// signalError is why a command ended: the user or the system asked for it.
type signalError struct{ sig syscall.Signal }

func (e *signalError) Error() string {
	if e.sig == syscall.SIGINT {
		return "interrupted"
	}
	return e.sig.String()
}

// run parses args, runs one command and closes what the command opened.
func (a *app) run(ctx context.Context, args []string) error {
	root := a.command(args)
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	err := root.ExecuteContext(ctx)
	if closeErr := a.close(); err == nil {
		err = closeErr
	}
	return err
}

// command builds the tree of commands, as far as args need it.
func (a *app) command(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:           "slipway",
		Short:         "Build, distribute and run container images",
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       engine.Version,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				err := fmt.Errorf("unknown command %q", args[0])
				if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
					err = fmt.Errorf("%w: did you mean %s?", err, strings.Join(like, " or "))
				}
				return &usageError{err, "slipway"}
			}
			return cmd.Help()
		},
		PersistentPreRunE: func(*cobra.Command, []string) error { return a.settle() },
	}
	root.SetVersionTemplate("slipway {{.Version}}\n")
	root.SuggestionsMinimumDistance = 2
	flags := root.PersistentFlags()
	flags.StringVar(&a.root, "root", os.Getenv("SLIPWAY_ROOT"), "state directory [$SLIPWAY_ROOT]")
	flags.StringVar(&a.host, "host", os.Getenv("SLIPWAY_HOST"), "address of the engine, unix://PATH or tcp://HOST:PORT [$SLIPWAY_HOST]")
	flags.StringVar(&a.config, "config", os.Getenv("SLIPWAY_CONFIG"), "configuration file of an engine that is started (default: /etc/slipway/slipway.toml, /etc/buildkit/buildkitd.toml) [$SLIPWAY_CONFIG]")
	a.tls.addFlags(flags)
	flags.BoolVar(&a.standalone, "standalone", envBool("SLIPWAY_STANDALONE"), "run the engine inside this process [$SLIPWAY_STANDALONE]")
	flags.BoolVar(&a.debug, "debug", envBool("SLIPWAY_DEBUG"), "log what happens inside [$SLIPWAY_DEBUG]")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{err, cmd.CommandPath()}
	})
	root.AddCommand(makeCommands(a, args)...)
	return root
}

// envBool reads a boolean variable; anything that is not clearly false counts as true.
func envBool(name string) bool {
	value, ok := os.LookupEnv(name)
	if !ok || value == "" {
		return false
	}
	b, err := strconv.ParseBool(value)
	return err != nil || b
}

// args checks the number of arguments and says which are missing; max -1 means any number.
func args(min, max int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < min:
			return &usageError{fmt.Errorf("%s needs %s", cmd.Name(), count(min, "argument")), cmd.CommandPath()}
		case max >= 0 && len(args) > max:
			return &usageError{fmt.Errorf("%s takes %s, got %d", cmd.Name(), count(max, "argument"), len(args)), cmd.CommandPath()}
		}
		return nil
	}
}

func count(n int, noun string) string {
	switch n {
	case 0:
		return "no " + noun + "s"
	case 1:
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

// report prints err as one line and returns the exit code: 0, the code of an exitError (run's is its container's, build
// --verify-cache has exitDifferent), 130 or 143 after a signal, 2 for a wrong command line, otherwise 1.
func (a *app) report(err error) int {
	if err == nil {
		return 0
	}
	code := 1
	var exit *exitError
	var usage *usageError
	var sig *signalError
	switch {
	case errors.As(err, &exit):
		if exit.err == nil {
			return exit.code
		}
		code = exit.code
	case errors.As(err, &usage):
		code = 2
	case errors.As(err, &sig):
		code = 128 + int(sig.sig)
	}
	fmt.Fprintf(a.err, "%s: %s\n", a.program, message(err))
	if a.debug {
		fmt.Fprintf(a.err, "%+v\n", stack.Formatter(err))
	}
	return code
}

// message is err without what only says which protocol carried it.
func message(err error) string {
	text := err.Error()
	if s, ok := status.FromError(err); ok && s.Message() != "" {
		text = strings.ReplaceAll(text, fmt.Sprintf("rpc error: code = %s desc = ", s.Code()), "")
	}
	return strings.TrimRight(text, "\n")
}

// stdin, stdout and stderr are the program's streams.
func (a *app) stdin() io.Reader  { return a.in }
func (a *app) stdout() io.Writer { return a.out }
func (a *app) stderr() io.Writer { return a.err }
