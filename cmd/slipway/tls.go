// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"
)

// tlsFiles name the PEM files for connections over TCP: a client's, or with `slipway daemon` the server's.
type tlsFiles struct {
	ca, cert, key string
	// dir has all three, by buildctl's names. It is for clients.
	dir string
	// serverName is whom the server's certificate must be for; "" is the host of the address.
	serverName string
}

func (t *tlsFiles) addFlags(flags *pflag.FlagSet) {
	flags.StringVar(&t.ca, "tlscacert", os.Getenv("SLIPWAY_TLSCACERT"), "authority that vouches for the other side, with tcp:// [$SLIPWAY_TLSCACERT]")
	flags.StringVar(&t.cert, "tlscert", os.Getenv("SLIPWAY_TLSCERT"), "own certificate, with tcp:// [$SLIPWAY_TLSCERT]")
	flags.StringVar(&t.key, "tlskey", os.Getenv("SLIPWAY_TLSKEY"), "key of the certificate [$SLIPWAY_TLSKEY]")
	flags.StringVar(&t.dir, "tlsdir", os.Getenv("SLIPWAY_TLSDIR"), "directory with ca.pem, cert.pem and key.pem (or ca.crt, tls.crt, tls.key) [$SLIPWAY_TLSDIR]")
	flags.StringVar(&t.serverName, "tlsservername", os.Getenv("SLIPWAY_TLSSERVERNAME"), "name in the engine's certificate (default: the host of --host) [$SLIPWAY_TLSSERVERNAME]")
}

// resolve finds the files of dir.
func (t tlsFiles) resolve() (tlsFiles, error) {
	if t.dir == "" {
		return t, nil
	}
	if t.ca != "" || t.cert != "" || t.key != "" {
		return t, errors.New("--tlsdir cannot be given together with --tlscacert, --tlscert or --tlskey")
	}
	for _, f := range []struct {
		file  *string
		names [2]string
	}{
		{&t.ca, [2]string{"ca.pem", "ca.crt"}},
		{&t.cert, [2]string{"cert.pem", "tls.crt"}},
		{&t.key, [2]string{"key.pem", "tls.key"}},
	} {
		for _, name := range f.names {
			if path := filepath.Join(t.dir, name); *f.file == "" {
				if _, err := os.Stat(path); err == nil {
					*f.file = path
				}
			}
		}
		if *f.file == "" {
			return t, fmt.Errorf("--tlsdir %s: has neither %s nor %s", t.dir, f.names[0], f.names[1])
		}
	}
	return t, nil
}

// client is the configuration of a client of the engine at address ("HOST:PORT").
func (t tlsFiles) client(address string) (*tls.Config, error) {
	t, err := t.resolve()
	if err != nil {
		return nil, err
	}
	if t.cert == "" || t.key == "" {
		return nil, fmt.Errorf("engine at tcp://%s: a client certificate is needed: --tlscert and --tlskey, or --tlsdir", address)
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("address tcp://%s: want tcp://HOST:PORT", address)
	}
	conf := &tls.Config{ServerName: t.serverName, MinVersion: tls.VersionTLS12}
	if conf.ServerName == "" {
		conf.ServerName = host
	}
	pair, err := tls.LoadX509KeyPair(t.cert, t.key)
	if err != nil {
		return nil, fmt.Errorf("client certificate %s with key %s: %w", t.cert, t.key, err)
	}
	conf.Certificates = []tls.Certificate{pair}
	if t.ca != "" {
		pem, err := os.ReadFile(t.ca)
		if err != nil {
			return nil, fmt.Errorf("--tlscacert: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--tlscacert %s: no PEM certificate in it", t.ca)
		}
	}
	return conf, nil
}

// tcpAddress is the HOST:PORT of a tcp:// address.
func tcpAddress(address string) (string, bool) {
	return strings.CutPrefix(address, "tcp://")
}

// tlsDialer connects to an engine over TCP.
func (a *app) tlsDialer(address string) (dialFunc, error) {
	conf, err := a.tls.client(address)
	if err != nil {
		return nil, err
	}
	d := tls.Dialer{Config: conf}
	return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }, nil
}
