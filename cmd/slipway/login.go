// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/docker/cli/cli/config/credentials"
	"github.com/docker/cli/cli/config/types"
	mobyclient "github.com/moby/moby/client"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func newLoginCommand(a *app) *cobra.Command {
	var user, password string
	var fromStdin bool
	cmd := &cobra.Command{
		Use:   "login [OPTIONS] [HOST]",
		Short: "Check a user name and password with a registry and keep them for push and pull",
		Long:  "Check a user name and password with a registry and keep them for push and pull, in docker's config.json or with the credential helper that it names. Without HOST, Docker Hub.",
		Args:  args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if password != "" || cmd.Flags().Changed("password") {
				return &usageError{errors.New("-p would show the password in the process list: use --password-stdin, or type it when asked"), cmd.CommandPath()}
			}
			key := hubKey
			host := "docker.io"
			if len(args) == 1 {
				host = loginHost(args[0])
				key = registryKey(host)
			}
			ctx := cmd.Context()
			password, err := a.readLogin(ctx, host, &user, fromStdin)
			if err != nil {
				return err
			}
			cli, err := a.docker(ctx)
			if err != nil {
				return err
			}
			res, err := cli.RegistryLogin(ctx, mobyclient.RegistryLoginOptions{Username: user, Password: password, ServerAddress: key})
			if err != nil {
				return interrupted(ctx, apiError(err))
			}
			cfg, err := dockerConfig()
			if err != nil {
				return err
			}
			if !cfg.ContainsAuth() {
				cfg.CredentialsStore = credentials.DetectDefaultStore(cfg.CredentialsStore)
			}
			auth := types.AuthConfig{Username: user, Password: password, ServerAddress: key}
			if res.Auth.IdentityToken != "" {
				auth.Password, auth.IdentityToken = "", res.Auth.IdentityToken
			}
			if err := cfg.GetCredentialsStore(key).Store(auth); err != nil {
				return fmt.Errorf("keep the credentials for %s (see %s): %w", host, cfg.Filename, err)
			}
			fmt.Fprintln(a.out, "Login Succeeded")
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&user, "username", "u", "", "user name")
	flags.BoolVar(&fromStdin, "password-stdin", false, "read the password from standard input")
	flags.StringVarP(&password, "password", "p", "", "refused: use --password-stdin")
	return cmd
}

// loginHost is the host in what docker login accepts: a host, or a URL that begins with one.
func loginHost(text string) string {
	for _, scheme := range []string{"https://", "http://"} {
		text = strings.TrimPrefix(text, scheme)
	}
	host, _, _ := strings.Cut(text, "/")
	if registryKey(host) == hubKey {
		return "docker.io"
	}
	return host
}

// readLogin asks for what is missing of user name and password.
func (a *app) readLogin(ctx context.Context, host string, user *string, fromStdin bool) (string, error) {
	fd, tty := terminal(a.in)
	if fromStdin {
		if *user == "" {
			return "", errors.New("--password-stdin needs --username")
		}
		data, err := io.ReadAll(io.LimitReader(a.in, 1<<20))
		if err != nil {
			return "", fmt.Errorf("read the password: %w", err)
		}
		password := strings.TrimRight(string(data), "\r\n")
		if password == "" {
			return "", errors.New("the password on standard input is empty")
		}
		return password, nil
	}
	if !tty {
		return "", errors.New("standard input is not a terminal: give the password with --password-stdin and the user with --username")
	}
	if *user == "" {
		fmt.Fprintf(a.err, "Username for %s: ", host)
		line, err := prompt(ctx, fd, func() (string, error) { return bufio.NewReader(a.in).ReadString('\n') })
		if err != nil {
			return "", fmt.Errorf("read the user name: %w", err)
		}
		if *user = strings.TrimSpace(line); *user == "" {
			return "", errors.New("the user name is empty")
		}
	}
	fmt.Fprintf(a.err, "Password for %s at %s: ", *user, host)
	password, err := prompt(ctx, fd, func() (string, error) {
		data, err := term.ReadPassword(fd)
		return string(data), err
	})
	fmt.Fprintln(a.err)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	if password == "" {
		return "", errors.New("the password is empty")
	}
	return password, nil
}

// prompt reads from the terminal until ctx ends. A read that is given up leaves the terminal as it was.
func prompt(ctx context.Context, fd int, read func() (string, error)) (string, error) {
	state, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	type answer struct {
		text string
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		text, err := read()
		answers <- answer{text, err}
	}()
	select {
	case got := <-answers:
		return got.text, got.err
	case <-ctx.Done():
		_ = term.Restore(fd, state)
		return "", context.Cause(ctx)
	}
}

func newLogoutCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "logout [HOST]",
		Short: "Forget the credentials for a registry",
		Args:  args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			host := "docker.io"
			if len(args) == 1 {
				host = loginHost(args[0])
			}
			cfg, err := dockerConfig()
			if err != nil {
				return err
			}
			key := registryKey(host)
			store := cfg.GetCredentialsStore(key)
			auth, err := store.Get(key)
			if err == nil && auth.Username == "" && auth.Password == "" && auth.IdentityToken == "" && auth.RegistryToken == "" {
				fmt.Fprintln(a.out, "Not logged in to", host)
				return nil
			}
			if err := store.Erase(key); err != nil {
				return fmt.Errorf("forget the credentials for %s (see %s): %w", host, cfg.Filename, err)
			}
			fmt.Fprintln(a.out, "Removed login credentials for", host)
			return nil
		},
	}
}
