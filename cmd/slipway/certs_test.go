// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, err
}

// write makes a certificate and writes dir/{ca,cert,key}.pem.
func (a *authority) write(dir string, usage x509.ExtKeyUsage) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"engine.test"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"ca.pem": a.pem, "cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"key.pem": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// writeCerts makes what a server and clients need in dir, and a client in dir/other whom the server does not know.
func writeCerts(dir string) error {
	ours, err := newAuthority("ours")
	if err != nil {
		return err
	}
	if err := ours.write(filepath.Join(dir, "server"), x509.ExtKeyUsageServerAuth); err != nil {
		return err
	}
	if err := ours.write(dir, x509.ExtKeyUsageClientAuth); err != nil {
		return err
	}
	other, err := newAuthority("other")
	if err != nil {
		return err
	}
	if err := other.write(filepath.Join(dir, "other"), x509.ExtKeyUsageClientAuth); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "other", "ca.pem"), ours.pem, 0o600) // it knows the server
}

func scriptCerts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: certs DIR")
	}
	ts.Check(writeCerts(ts.MkAbs(args[0])))
}

// mountsOf lists what is mounted below dir.
func mountsOf(dir string) ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	return points, nil
}

func scriptNoMounts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: no-mounts DIR")
	}
	points, err := mountsOf(ts.MkAbs(args[0]))
	ts.Check(err)
	if len(points) > 0 {
		ts.Fatalf("mounted: %q", points)
	}
}

func scriptAwaitMount(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: await-mount DIR")
	}
	for deadline := time.Now().Add(scriptPatience); ; time.Sleep(10 * time.Millisecond) { // until the engine has mounted something
		points, err := mountsOf(ts.MkAbs(args[0]))
		ts.Check(err)
		if len(points) > 0 {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nothing is mounted below %s", args[0])
		}
	}
}

func TestTLSFiles(t *testing.T) {
	dir := t.TempDir()
	if err := writeCerts(dir); err != nil {
		t.Fatal(err)
	}
	kubernetes := filepath.Join(t.TempDir(), "k")
	if err := os.MkdirAll(kubernetes, 0o700); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"ca.pem": "ca.crt", "cert.pem": "tls.crt", "key.pem": "tls.key"} {
		if err := os.Rename(filepath.Join(dir, "other", from), filepath.Join(kubernetes, to)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name, want string
		files      tlsFiles
	}{
		{"directory", "", tlsFiles{dir: dir}},
		{"directory of a Kubernetes secret", "", tlsFiles{dir: kubernetes}},
		{"files", "", tlsFiles{ca: dir + "/ca.pem", cert: dir + "/cert.pem", key: dir + "/key.pem"}},
		{"system's authorities", "", tlsFiles{cert: dir + "/cert.pem", key: dir + "/key.pem"}},
		{"both", "--tlsdir cannot be given together", tlsFiles{dir: dir, ca: dir + "/ca.pem"}},
		{"empty directory", "has neither ca.pem nor ca.crt", tlsFiles{dir: t.TempDir()}},
		{"no certificate", "a client certificate is needed", tlsFiles{ca: dir + "/ca.pem"}},
		{"not a certificate", "client certificate", tlsFiles{cert: dir + "/key.pem", key: dir + "/key.pem"}},
		{"not an authority", "no PEM certificate", tlsFiles{ca: dir + "/key.pem", cert: dir + "/cert.pem", key: dir + "/key.pem"}},
	} {
		conf, err := tc.files.client("127.0.0.1:1")
		if tc.want == "" && (err != nil || conf.ServerName != "127.0.0.1") || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}
