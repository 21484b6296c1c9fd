// SPDX-License-Identifier: Apache-2.0

package op

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"

	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
	"github.com/seed-68981b69/slipway/executor/network"
	"github.com/seed-68981b69/slipway/executor/runc"
	"github.com/seed-68981b69/slipway/executor/runc/runctest"
)

// authority makes a certificate authority with that subject; the certificate is in PEM form.
func authority(t *testing.T, subject pkix.Name) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// serverCertificate is for one address, from an authority.
func serverCertificate(t *testing.T, ca tls.Certificate, ip net.IP) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{ip}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, &key.PublicKey, ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestExtraCA: what a step sees of the authorities, and what of them is in its layer: nothing, whatever it does to the bundle.
func TestExtraCA(t *testing.T) {
	e := newExecEnv(t)
	_, text := authority(t, pkix.Name{CommonName: "Company CA"})
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	plain := New(*e.Deps)
	var err error
	if e.ExtraCA, err = LoadExtraCA(filepath.Join(t.TempDir(), "extra-ca"), []string{file}); err != nil {
		t.Fatal(err)
	}
	e.newOp = New(*e.Deps)
	block := string(e.ExtraCA.block)
	own := "-----BEGIN CERTIFICATE-----\nthe image's own\n-----END CERTIFICATE-----\n"
	debian := []string{"/etc/ssl 750 3:4 @77", "/etc/ssl/certs 755 5:6 @88", "/etc/ssl/certs/ca-certificates.crt 640 1:2 @99 =" + own}
	fedora := []string{
		"/etc/pki", "/etc/pki/tls", "/etc/pki/tls/certs", "/etc/pki/extracted", "/etc/pki/extracted/b.pem =" + own,
		"/etc/pki/tls/certs/ca-bundle.crt -> ../../extracted/b.pem",
	}
	const bundle = "/etc/ssl/certs/ca-certificates.crt"
	for _, tc := range []struct {
		name   string
		root   []string
		script string
		want   []string // what the step prints
		layer  []string
	}{
		{"read", debian, "cat " + bundle, []string{own + block}, nil},
		{"as it was", debian, "stat -c '%n %a %u:%g %Y' /etc/ssl /etc/ssl/certs " + bundle, []string{
			"/etc/ssl 750 3:4 77\n/etc/ssl/certs 755 5:6 88\n" + bundle + " 640 1:2 99\n",
		}, nil},
		{"by a link", fedora, "cat /etc/pki/tls/certs/ca-bundle.crt", []string{own + block}, nil},
		{"rendered anew", debian, "cp " + bundle + " /tmp/old; echo fresh >/tmp/new && mv -f /tmp/new " + bundle + " && cat " + bundle + " && rm /tmp/old", []string{"fresh\n"}, []string{bundle + " =fresh\n"}},
		{"appended to", debian, "echo more >>" + bundle + "; cat " + bundle, []string{own + block + "more\n"}, []string{bundle + " =" + own + "more\n"}},
		{"edited in place", debian, "sed -i 's/image/IMAGE/' " + bundle, nil, []string{bundle + " =" + strings.ReplaceAll(own, "image", "IMAGE")}},
		{"the same certificate by the step itself", debian, "cat " + extraCADir + "/extra.crt >>" + bundle, nil, []string{bundle + " =" + own + string(text)}},
		{"removed", debian, "rm " + bundle + "; test -e " + bundle + " || echo gone", []string{"gone\n"}, nil},
		{"mode changed", debian, "chmod 600 " + bundle, nil, []string{bundle + " =" + own}},
		{"directory replaced", debian, "rm -r /etc/ssl/certs && mkdir /etc/ssl/certs && ls /etc/ssl/certs && echo x >/etc/ssl/certs/x", nil, []string{"/etc/ssl/certs", "/etc/ssl/certs/x =x\n"}},
		{"directory replaced by a link", debian, "rm -r /etc/ssl/certs && mkdir /certs && cp " + file + " /certs/ca-certificates.crt 2>/dev/null; ln -s /certs /etc/ssl/certs", nil, []string{"/certs", "/etc/ssl/certs"}},
		{"no bundle", []string{"/etc/ssl", "/etc/ssl/certs"}, "cat " + bundle, []string{block}, nil},
		{"no bundle, touched", []string{"/etc/ssl", "/etc/ssl/certs"}, "touch " + bundle, nil, nil},
		{"no bundle, removed", []string{"/etc/ssl", "/etc/ssl/certs"}, "rm " + bundle, nil, nil},
		{"no bundle, made", []string{"/etc/ssl", "/etc/ssl/certs"}, "echo made >" + bundle, nil, []string{bundle + " =made\n"}},
		{"no directory", nil, "test -e /etc/ssl || echo none; mkdir -p /etc/ssl/certs", []string{"none\n"}, []string{"/etc/ssl", "/etc/ssl/certs"}},
		{"variables", debian, "env; ls " + extraCADir + "; touch " + extraCADir + "/x || echo refused", []string{
			"\nSSL_CERT_DIR=/etc/ssl/certs:/etc/pki/tls/certs:/dev/slipway-ca\n", "\nNODE_EXTRA_CA_CERTS=/dev/slipway-ca/extra.crt\n",
			"\nREQUESTS_CA_BUNDLE=" + bundle + "\n", "extra.crt\n", "refused\n",
		}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := *e
			e.t = t
			e.root = commitTree(t, e.Deps, e.root, parseTree(t, tc.root...))
			script := shell(tc.script)
			changed, log := e.must(script, nil)
			for _, want := range tc.want {
				if !strings.Contains("\n"+log, want) {
					t.Errorf("no %q in what the step printed:\n%s", want, log)
				}
			}
			diffLines(t, changed, tc.layer)
			for _, line := range showSnapshot(t, e.Deps, e.root) {
				if strings.Contains(line, "slipway") {
					t.Errorf("the image has changed: %q", line)
				}
			}
			// Authorities or not, the key is the same.
			with, err1 := e.newOp(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: script}}, 1))
			without, err2 := plain(vertex(&pb.Op{Op: &pb.Op_Exec{Exec: script}}, 1))
			if err1 != nil || err2 != nil || fmt.Sprint(with.Parts()) != fmt.Sprint(without.Parts()) {
				t.Errorf("keys: %v, %v", err1, err2)
			}
		})
	}
	t.Run("variables of the image stay", func(t *testing.T) {
		o := shell("env")
		o.Meta.Env = append(o.Meta.Env, "SSL_CERT_DIR=/own")
		if _, log := e.must(o, nil); !strings.Contains(log, "SSL_CERT_DIR=/own\n") || strings.Contains(log, "SSL_CERT_DIR=/etc") {
			t.Errorf("environment:\n%s", log)
		}
	})
}

// TestExtraCAServer: programs in a step reach a server whose certificate is from such an authority, also after they have rendered
// the bundle anew, and none without.
func TestExtraCAServer(t *testing.T) {
	e := newExecEnv(t)
	n, err := network.New(network.Options{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	r, err := runc.New(runc.Options{StateDir: t.TempDir(), Network: n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	e.Executor, e.DefaultNetwork = r, executor.NetworkBridge

	ca, text := authority(t, pkix.Name{CommonName: "Company CA", Organization: []string{"Company"}})
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(n.Gateway().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") }))
	server.Listener.Close()
	server.Listener = listener
	server.TLS = &tls.Config{Certificates: []tls.Certificate{serverCertificate(t, ca, n.Gateway().AsSlice())}}
	server.StartTLS()
	defer server.Close()

	rootfs := t.TempDir()
	if err := os.Mkdir(filepath.Join(rootfs, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	defer runctest.RemoveInside()
	program, err := os.ReadFile(runctest.Inside(t, rootfs))
	if err != nil {
		t.Fatal(err)
	}
	base := commitTree(t, e.Deps, e.root, parseTree(t, "/bin/inside 755 ="+string(program), "/etc/ssl", "/etc/ssl/certs"))
	const bundle = "/etc/ssl/certs/ca-certificates.crt"
	get := "inside get " + server.URL
	for name, root := range map[string]snapshot.Snapshot{
		"with a bundle":       commitTree(t, e.Deps, base, parseTree(t, bundle+" =# nobody\n")),
		"without a bundle":    base,
		"without a directory": commitTree(t, e.Deps, e.root, parseTree(t, "/bin/inside 755 ="+string(program))),
	} {
		e.ExtraCA = nil
		e.newOp, e.root = New(*e.Deps), root
		if _, log := e.must(shell(get+" || echo refused"), nil); !strings.Contains(log, "unknown authority") || !strings.Contains(log, "refused\n") {
			t.Errorf("%s, without the authority: %s", name, log)
		}
		if e.ExtraCA, err = LoadExtraCA(filepath.Join(t.TempDir(), "extra-ca"), []string{file}); err != nil {
			t.Fatal(err)
		}
		e.newOp = New(*e.Deps)
		if _, log := e.must(shell(get+" && mkdir -p /etc/ssl/certs && echo >/new && mv /new "+bundle+" && "+get), nil); log != "hello\nhello\n" {
			t.Errorf("%s: %s", name, log)
		}
	}
}

// TestSubjectHash compares with OpenSSL.
func TestSubjectHash(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("needs openssl: SKIPPED")
	}
	for _, name := range []pkix.Name{
		{CommonName: "simple"},
		{CommonName: "  Spaces   and\tTabs  "},
		{Country: []string{"DE"}, Province: []string{"Baden-Württemberg"}, Locality: []string{"Ä Ö Ü"}, CommonName: "ÄÖÜ CA * & @"},
		{Organization: []string{"One", "Two"}, OrganizationalUnit: []string{"Unit"}, CommonName: "Mixed CASE", SerialNumber: "007"},
		{},
	} {
		ca, text := authority(t, name)
		cmd := exec.Command("openssl", "x509", "-noout", "-subject_hash")
		cmd.Stdin = strings.NewReader(string(text))
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		got, err := subjectHash(ca.Leaf)
		if err != nil || got != strings.TrimSpace(string(out)) {
			t.Errorf("%v: %s, %v; openssl says %s", name, got, err, out)
		}
	}
}

func TestLoadExtraCARefuses(t *testing.T) {
	dir := t.TempDir()
	for content, want := range map[string]string{
		"nothing": "has no certificate",
		"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n": "has a private key; want certificates only",
		"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n": "x509",
	} {
		file := filepath.Join(dir, "file")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadExtraCA(filepath.Join(dir, "out"), []string{file}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%q: %v, want an error with %q", content, err, want)
		}
	}
	if ca, err := LoadExtraCA(filepath.Join(dir, "out"), nil); ca != nil || err != nil {
		t.Errorf("no files: %v, %v", ca, err)
	}
}
