// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/index"
	"github.com/seed-68981b69/slipway/cache/snapshot"
	"github.com/seed-68981b69/slipway/executor"
)

// ExtraCA are certificate authorities of this machine's network that steps are to trust, without that their layers know of them:
// companies intercept TLS with an authority of their own, and what was built there must not trust it elsewhere.
//
// A step sees them in two ways.
//
// First, in the image's own bundle. It is not mounted over: a program that renders the bundle anew (update-ca-certificates, in
// every `apt-get install ca-certificates`) renames a file over it, which the kernel refuses for a mount point. Instead a layer
// with the bundle and our block at its end lies between the image and what the step writes: the step may change, replace or
// remove the file like any other, and when it has not there is nothing to take back. What it has written is rid of the block before
// it becomes a layer; the block has marks, so that a certificate which the step itself has added is left alone.
//
// Second, in a directory of their own (extraCADir), which SSL_CERT_DIR adds to those that OpenSSL, Go, curl, Python and Ruby look
// into: after such a program has run the bundle is without the block. Where the step has no such variable, that is; and
// NODE_EXTRA_CA_CERTS and REQUESTS_CA_BUNDLE for programs that look at no bundle of the system.
//
// None of it is in a cache key, as the addresses of proxies are not: it says how a step reaches the network, not what is to come of it.
type ExtraCA struct {
	block []byte
	dir   string
}

const (
	// extraCADir is where a step finds the certificates, one a file by the hash of its subject, and extraCAFile all of them.
	extraCADir  = "/dev/slipway-ca"
	extraCAFile = "extra.crt"
	// defaultCertDirs are where OpenSSL and Go look on the distributions that there are.
	defaultCertDirs = "/etc/ssl/certs:/etc/pki/tls/certs"

	extraCABegin = "# slipway: what follows is there for build steps only, until the next mark\n"
	extraCAEnd   = "# slipway: end\n"
	// maxBundle bounds what is read of an image's bundle; they have 200 KB.
	maxBundle = 16 << 20
)

// caBundles are where programs look for the authorities that they trust: Debian and its relatives, Alpine, Arch; Fedora and
// its relatives, old and new; openSUSE; Alpine's OpenSSL.
var caBundles = []string{
	"/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
	"/etc/pki/tls/certs/ca-bundle.crt",
	"/etc/ssl/ca-bundle.pem",
	"/etc/pki/tls/cacert.pem",
	"/etc/ssl/cert.pem",
}

// LoadExtraCA reads the certificates of PEM files and writes them into dir, which is made anew, in the form that steps see. No files
// are no authorities: nil.
func LoadExtraCA(dir string, files []string) (*ExtraCA, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, nil
	}
	var certs []*x509.Certificate
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("extra certificate authorities: %w", err)
		}
		found, err := parseCertificates(b)
		if err != nil {
			return nil, fmt.Errorf("extra certificate authorities: %s: %w", name, err)
		}
		certs = append(certs, found...)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	var all []byte
	names := map[string]int{}
	for _, c := range certs {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		all = append(all, text...)
		hash, err := subjectHash(c)
		if err != nil {
			return nil, fmt.Errorf("extra certificate authorities: %s: %w", c.Subject, err)
		}
		if err := writeReadable(filepath.Join(dir, fmt.Sprintf("%s.%d", hash, names[hash])), text); err != nil {
			return nil, err
		}
		names[hash]++
	}
	return &ExtraCA{block: slices.Concat([]byte(extraCABegin), all, []byte(extraCAEnd)), dir: dir}, writeReadable(filepath.Join(dir, extraCAFile), all)
}

// writeReadable writes a file for everybody to read, whatever the umask.
func writeReadable(name string, b []byte) error {
	if err := os.WriteFile(name, b, 0o644); err != nil {
		return err
	}
	return os.Chmod(name, 0o644)
}

// parseCertificates returns the certificates of a PEM file, which has nothing else.
func parseCertificates(b []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("has a %s; want certificates only", strings.ToLower(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("has no certificate (in PEM form)")
	}
	return certs, nil
}

// subjectHash is the name by which OpenSSL looks for a certificate in a directory (`openssl x509 -hash`): the beginning of the
// SHA-1 of the subject in a canonical form, in which strings are UTF-8, in lower case and without needless space.
func subjectHash(c *x509.Certificate) (string, error) {
	var subject []asn1.RawValue
	if rest, err := asn1.Unmarshal(c.RawSubject, &subject); err != nil || len(rest) > 0 {
		return "", fmt.Errorf("subject: %w", err)
	}
	h := sha1.New()
	for _, rdn := range subject {
		var set pkix.RelativeDistinguishedNameSET
		if _, err := asn1.UnmarshalWithParams(rdn.FullBytes, &set, "set"); err != nil {
			return "", fmt.Errorf("subject: %w", err)
		}
		var values [][]byte
		for _, attr := range set {
			if text, ok := attr.Value.(string); ok {
				attr.Value = asn1.RawValue{Tag: asn1.TagUTF8String, Bytes: []byte(canonicalText(text))}
			}
			der, err := asn1.Marshal(attr)
			if err != nil {
				return "", fmt.Errorf("subject: %w", err)
			}
			values = append(values, der)
		}
		slices.SortFunc(values, bytes.Compare) // as DER wants of a set
		der, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagSet, IsCompound: true, Bytes: bytes.Join(values, nil)})
		if err != nil {
			return "", fmt.Errorf("subject: %w", err)
		}
		h.Write(der)
	}
	sum := h.Sum(nil)
	return fmt.Sprintf("%02x%02x%02x%02x", sum[3], sum[2], sum[1], sum[0]), nil
}

// canonicalText is OpenSSL's: ASCII letters in lower case, one space for any white space, none at the ends.
func canonicalText(s string) string {
	lower := func(r rune) rune {
		if r >= 'A' && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}
	ascii := func(r rune) bool { return strings.ContainsRune(" \t\n\v\f\r", r) }
	return strings.Map(lower, strings.Join(strings.FieldsFunc(s, ascii), " "))
}

// stepCA is what one step sees of the authorities.
type stepCA struct {
	ca *ExtraCA
	// above is a directory to lie over the step's root, "" when there is nothing to put there; bundles are what is in it.
	above   string
	bundles []caBundle
}

// caBundle is a bundle that was put over a root.
type caBundle struct {
	path string // in the root, links resolved
	had  bool   // the root has one there
}

// extraCA prepares the authorities for a step with that root; nil when there are none.
func (s *step) extraCA(ctx context.Context, root *snapshot.View) (*stepCA, error) {
	ca := s.op.deps.ExtraCA
	if ca == nil {
		return nil, nil
	}
	c := &stepCA{ca: ca, bundles: findBundles(root)}
	if len(c.bundles) == 0 || s.op.deps.Snapshots.Info().Driver != snapshot.DriverOverlay {
		c.bundles = nil
		return c, nil
	}
	c.above = filepath.Join(s.op.deps.tempDir(), "ca-"+randomID())
	if err := os.Mkdir(c.above, 0o755); err != nil {
		return nil, err
	}
	s.later(func() error { return os.RemoveAll(c.above) })
	for _, b := range c.bundles {
		if err := c.put(ctx, root, b); err != nil {
			return nil, fmt.Errorf("extra certificate authorities: %s: %w", b.path, err)
		}
	}
	return c, nil
}

// findBundles returns the bundles of a root. One without any gets one where most programs look, if the directory is there: a
// directory of ours would look to the step as if it had been made already.
func findBundles(root *snapshot.View) []caBundle {
	var found []caBundle
	for _, name := range caBundles {
		p, err := resolve(root, name, true)
		if err != nil || slices.ContainsFunc(found, func(b caBundle) bool { return b.path == p }) {
			continue
		}
		if e, ok := root.Lookup(p); ok && e.Type == index.File && e.Size <= maxBundle {
			found = append(found, caBundle{path: p, had: true})
		}
	}
	if len(found) > 0 {
		return found
	}
	p, err := resolve(root, caBundles[0], true)
	if err != nil {
		return nil
	}
	_, there := root.Lookup(p)
	if dir, ok := root.Lookup(path.Dir(p)); !ok || dir.Type != index.Dir || there {
		return nil
	}
	return []caBundle{{path: p}}
}

// put writes a bundle with our block to c.above, and the directories that it is in as they are in the root: the highest one is
// what a mount shows of each.
func (c *stepCA) put(ctx context.Context, root *snapshot.View, b caBundle) error {
	for i := range len(b.path) {
		if b.path[i] != '/' {
			continue
		}
		e, _ := root.Lookup(b.path[:i])
		dir := filepath.Join(c.above, b.path[:i])
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := setMeta(dir, e); err != nil {
			return err
		}
	}
	meta := index.Entry{Type: index.File, Mode: 0o644}
	content := c.ca.block
	if b.had {
		meta, _ = root.Lookup(b.path)
		f, err := root.OpenFile(ctx, b.path)
		if err != nil {
			return err
		}
		defer f.Close()
		own, err := io.ReadAll(io.LimitReader(f, maxBundle))
		if err != nil {
			return err
		}
		if len(own) > 0 && own[len(own)-1] != '\n' {
			own = append(own, '\n')
		}
		content = append(own, content...)
	}
	p := filepath.Join(c.above, b.path)
	if err := os.WriteFile(p, content, 0o600); err != nil {
		return err
	}
	if err := setMeta(p, meta); err != nil {
		return err
	}
	for dir := path.Dir(b.path); dir != "."; dir = path.Dir(dir) { // what was made in them has changed their times
		e, _ := root.Lookup(dir)
		if err := setTime(filepath.Join(c.above, dir), e.ModTime); err != nil {
			return err
		}
	}
	return nil
}

// setMeta gives a file or directory of ours the owner, mode, attributes and time of an entry.
func setMeta(p string, e index.Entry) error {
	if err := os.Lchown(p, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	for k, v := range e.Xattrs {
		if err := unix.Lsetxattr(p, k, []byte(v), 0); err != nil {
			return &os.PathError{Op: "setxattr " + k, Path: p, Err: err}
		}
	}
	if err := os.Chmod(p, fileMode(e.Mode)); err != nil {
		return err
	}
	return setTime(p, e.ModTime)
}

// environ adds the variables for programs that do not look at the bundle, as far as env does not have them.
func (c *stepCA) environ(env []string) []string {
	if c == nil {
		return env
	}
	add := []string{"SSL_CERT_DIR=" + defaultCertDirs + ":" + extraCADir, "NODE_EXTRA_CA_CERTS=" + extraCADir + "/" + extraCAFile}
	if i := slices.IndexFunc(c.bundles, func(b caBundle) bool { return b.had }); i >= 0 {
		add = append(add, "REQUESTS_CA_BUNDLE=/"+c.bundles[i].path)
	}
	for _, v := range add {
		name, _, _ := strings.Cut(v, "=")
		if !slices.ContainsFunc(env, func(has string) bool { return strings.HasPrefix(has, name+"=") }) {
			env = append(env, v)
		}
	}
	return env
}

// mount is the directory with the certificates.
func (c *stepCA) mount() executor.Mount {
	return executor.Mount{Kind: executor.MountBind, Source: c.ca.dir, Target: extraCADir, Readonly: true, NoExec: true}
}

// takeBack removes from what a step has written, the directory upper, what it has of ours.
func (c *stepCA) takeBack(upper string) error {
	root, err := unix.Open(upper, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: upper, Err: err}
	}
	defer unix.Close(root)
	for _, b := range c.bundles {
		if err := c.takeBackFile(root, b); err != nil {
			return fmt.Errorf("take extra certificate authorities out of %s: %w", b.path, err)
		}
	}
	return nil
}

func (c *stepCA) takeBackFile(root int, b caBundle) error {
	dir, err := unix.Openat2(root, path.Dir(b.path), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil // nothing was written there, or the directory is another now
	}
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	name := path.Base(b.path)
	var st unix.Stat_t
	err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 && !b.had: // a whiteout of what only we had put there
		return unix.Unlinkat(dir, name, 0)
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > 2*maxBundle:
		return nil
	}
	fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	written, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	own := bytes.ReplaceAll(written, c.ca.block, nil)
	switch {
	case len(own) == len(written):
		return nil
	case len(own) == 0 && !b.had:
		return unix.Unlinkat(dir, name, 0)
	}
	if _, err := f.WriteAt(own, 0); err != nil {
		return err
	}
	if err := f.Truncate(int64(len(own))); err != nil {
		return err
	}
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}
