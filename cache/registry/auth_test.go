// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/seed-68981b69/slipway/cache/registry"
	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

func TestLogin(t *testing.T) {
	ctx := context.Background()
	for _, tc := range []struct {
		name   string
		server registrytest.Options
	}{
		{"basic", registrytest.Options{User: "mia", Password: "s3cret"}},
		{"token", registrytest.Options{User: "mia", Password: "s3cret", Token: true}},
		{"token and TLS", registrytest.Options{User: "mia", Password: "s3cret", Token: true, TLS: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := registrytest.Start(t, tc.server)
			dir := t.TempDir()
			r := newRegistry(t, registry.Options{DockerConfigDir: dir})

			err := r.Login(ctx, s.Host, "mia", "wrong")
			check(t, err, registry.ErrUnauthorized)
			if _, err := os.Stat(filepath.Join(dir, "config.json")); !os.IsNotExist(err) {
				t.Fatalf("a wrong password was kept: %v", err)
			}
			if err := r.Login(ctx, "https://"+s.Host+"/v2/", "mia", "s3cret"); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(dir, "config.json"))
			if err != nil || !strings.Contains(string(b), s.Host) {
				t.Fatalf("config.json = %s, %v", b, err)
			}
			if st, err := os.Stat(filepath.Join(dir, "config.json")); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("config.json is %v (%v): others can read it", st.Mode(), err)
			}
			if _, _, _, err := image(ctx, t, r, s.Host+"/a:1"); err != nil {
				t.Fatalf("push with the stored login: %v", err)
			}
			if err := r.Logout(ctx, s.Host); err != nil {
				t.Fatal(err)
			}
			if _, _, err := r.Resolve(ctx, s.Host+"/a:1"); !errors.Is(err, registry.ErrUnauthorized) {
				t.Errorf("after logout: %v", err)
			}
			if err := r.Logout(ctx, s.Host); !errors.Is(err, registry.ErrNotFound) {
				t.Errorf("second logout: %v", err)
			}
		})
	}
}

func TestLoginErrors(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	r := newRegistry(t, registry.Options{DockerConfigDir: dir})
	s := registrytest.Start(t, registrytest.Options{})
	for host, say := range map[string]string{
		"https://":      "no host name",
		"user@host":     "not a host name",
		"127.0.0.1:1":   "connection refused",
		"no.invalid:33": "no.invalid",
	} {
		if err := r.Login(ctx, host, "mia", "x"); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("Login(%q) = %v, want it to say %q", host, err, say)
		}
	}
	if err := r.Login(ctx, s.Host, "mia", ""); err == nil {
		t.Error("empty password accepted")
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte("{broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Login(ctx, s.Host, "mia", "x"); err == nil {
		t.Error("a damaged config.json was overwritten")
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "config.json")); string(b) != "{broken" {
		t.Errorf("config.json = %q", b)
	}
}

// TestCredentialHelper puts a helper on PATH that keeps its one password in a file.
func TestCredentialHelper(t *testing.T) {
	ctx := context.Background()
	s := registrytest.Start(t, registrytest.Options{User: "mia", Password: "s3cret"})
	bin, dir := t.TempDir(), t.TempDir()
	store := filepath.Join(t.TempDir(), "kept")
	script := `#!/bin/sh
case "$1" in
store) cat > ` + store + ` ;;
get) read host; if [ -f ` + store + ` ]; then cat ` + store + `; else echo "credentials not found in native keychain"; exit 1; fi ;;
erase) rm -f ` + store + ` ;;
esac
`
	if err := os.WriteFile(filepath.Join(bin, "docker-credential-test"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"credHelpers":{"`+s.Host+`":"test"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRegistry(t, registry.Options{DockerConfigDir: dir})
	if _, _, err := r.Resolve(ctx, s.Host+"/a:1"); !errors.Is(err, registry.ErrUnauthorized) {
		t.Fatalf("before login: %v", err)
	}
	if err := r.Login(ctx, s.Host, "mia", "s3cret"); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(filepath.Join(dir, "config.json"))
	if strings.Contains(string(b), "s3cret") || strings.Contains(string(b), "bWlhOnMzY3JldA") {
		t.Errorf("the password is in config.json: %s", b)
	}
	if b, err := os.ReadFile(store); err != nil || !strings.Contains(string(b), "s3cret") {
		t.Fatalf("the helper has %q, %v", b, err)
	}
	if _, _, _, err := image(ctx, t, r, s.Host+"/a:1"); err != nil {
		t.Fatal(err)
	}
	if err := r.Logout(ctx, s.Host); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(store); !os.IsNotExist(err) {
		t.Errorf("logout left the password: %v", err)
	}
}

func otherCA(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	conf := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "other"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, conf, conf, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
