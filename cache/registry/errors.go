// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// What an Error can be. Each wraps the matching error of containerd/errdefs, which the HTTP and gRPC APIs know.
var (
	// ErrNotFound: the registry does not have what was asked for.
	ErrNotFound = fmt.Errorf("not found in the registry: %w", errdefs.ErrNotFound)
	// ErrUnauthorized: no credentials, or wrong ones.
	ErrUnauthorized = fmt.Errorf("not authorized: %w", errdefs.ErrUnauthenticated)
	// ErrDenied: the credentials are right, but do not allow it.
	ErrDenied = fmt.Errorf("access denied: %w", errdefs.ErrPermissionDenied)
	// ErrUnreachable: nobody answers, or not in a way that can be trusted.
	ErrUnreachable = fmt.Errorf("registry not reachable: %w", errdefs.ErrUnavailable)
	// ErrUnavailable: the registry keeps answering that it cannot now.
	ErrUnavailable = fmt.Errorf("registry not available: %w", errdefs.ErrUnavailable)
	// ErrCorrupt: the bytes are not those that were promised.
	ErrCorrupt = fmt.Errorf("wrong bytes: %w", errdefs.ErrDataLoss)
)

// Error is a failure of a registry, told to its user: Message is one line that says what happened and what can
// be done. errors.Is finds one of the sentinels above, if one fits, and the cause.
type Error struct {
	// Err is the sentinel, or nil.
	Err error
	// Host is the registry, as images name it.
	Host    string
	Message string
	Cause   error
}

func (e *Error) Error() string { return e.Message }

// Unwrap returns the sentinel and the cause.
func (e *Error) Unwrap() []error {
	var errs []error
	for _, err := range []error{e.Err, e.Cause} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// explain turns what went wrong while doing action ("pull", "push") to named into an Error.
func (r *Registry) explain(ctx context.Context, action string, named reference.Named, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	host := reference.Domain(named)
	e := r.diagnose(ctx, host, named.String(), err)
	e.Message = fmt.Sprintf("%s %s: %s", action, named, e.Message)
	return e
}

// diagnose finds the class of err. what is the image, or the host itself.
func (r *Registry) diagnose(ctx context.Context, host, what string, err error) *Error {
	e := &Error{Host: host, Cause: err}
	var (
		status  remoteerrors.ErrUnexpectedStatus
		pass    *passing
		dns     *net.DNSError
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		invalid x509.CertificateInvalidError
		record  tls.RecordHeaderError
		netErr  net.Error
		bytes   *garbled
	)
	code := 0
	if errors.As(err, &status) {
		code = status.StatusCode
	}
	said := registryMessage(status.Body)
	switch {
	case errors.As(err, &bytes):
		e.Err = ErrCorrupt
		e.Message = fmt.Sprintf("%s got other bytes for blob %s than were sent, again and again%s, and the blob here is good: something on the way changes them, "+
			"or the registry stores them wrongly: look at the proxies and the network in between", host, bytes.desc.Digest, said)
	case errors.As(err, &pass) && pass.status != 0:
		e.Err, e.Host = ErrUnavailable, pass.host
		e.Message = fmt.Sprintf("%s answered %s: try again later", pass.host, pass)
	case errors.As(err, &pass):
		e.Err, e.Host = ErrUnreachable, pass.host
		e.Message = fmt.Sprintf("the connection to %s broke: %s: check the network, or try again later", pass.host, pass)
	case errors.Is(err, docker.ErrInvalidAuthorization) || code == http.StatusUnauthorized:
		e.Err = ErrUnauthorized
		switch known, sure := r.known(ctx, apiHost(host)); {
		case !sure:
			e.Message = fmt.Sprintf("%s wants a user name and password, or does not accept those that the client has%s: run \"slipway login %s\"", host, said, host)
		case known:
			e.Message = fmt.Sprintf("%s does not accept the user name or password%s: run \"slipway login %s\"", host, said, host)
		default:
			e.Message = fmt.Sprintf("%s wants a user name and password%s: run \"slipway login %s\"", host, said, host)
		}
	case code == http.StatusForbidden:
		e.Err = ErrDenied
		e.Message = fmt.Sprintf("%s does not allow it%s: check the repository name, or log in as another user with \"slipway login %s\"", host, said, host)
	case errors.Is(err, errdefs.ErrNotFound) || code == http.StatusNotFound:
		e.Err = ErrNotFound
		e.Message = fmt.Sprintf("not found at %s%s: check the name and the tag", host, said)
	case errors.As(err, &unknown) || errors.As(err, &invalid):
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("the certificate of %s is not trusted (%v): put the certificate of its authority into /etc/docker/certs.d/%s/ca.crt", host, root(err), host)
	case errors.As(err, &name):
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("the certificate of %s is for another host (%v): use the name that it is for", host, name)
	case errors.Is(err, http.ErrSchemeMismatch) || errors.As(err, &record) && strings.HasPrefix(string(record.RecordHeader[:]), "HTTP"):
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("%s speaks plain HTTP where TLS is expected: give it a certificate, or list it as an insecure registry", host)
	case errors.As(err, &dns):
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("there is no host %s (%v): check the name of the registry, or the network", dns.Name, dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("nothing answers at %s (connection refused): is the registry running, and the port right?", host)
	case errors.As(err, &netErr) && netErr.Timeout():
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("%s does not answer (timed out): check the name of the registry, or the network", host)
	case errors.As(err, new(*net.OpError)):
		e.Err = ErrUnreachable
		e.Message = fmt.Sprintf("cannot connect to %s: %v: check the name of the registry, or the network", host, root(err))
	case code != 0:
		e.Message = fmt.Sprintf("%s answered %s%s", host, status.Status, said)
	default:
		e.Message = oneLine(err.Error())
	}
	return e
}

// root is the innermost error, which says most in fewest words.
func root(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// registryMessage is what the body of an error response says, as ": …", or "".
func registryMessage(body []byte) string {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Details string `json:"details"`
	}
	if json.Unmarshal(body, &doc) != nil {
		return ""
	}
	var said []string
	for _, e := range doc.Errors {
		if m := oneLine(e.Message); m != "" {
			said = append(said, m)
		} else if e.Code != "" {
			said = append(said, strings.ToLower(e.Code))
		}
	}
	if doc.Details != "" {
		said = append(said, oneLine(doc.Details))
	}
	if len(said) == 0 {
		return ""
	}
	return " (" + strings.Join(said, "; ") + ")"
}

// oneLine keeps what others wrote from breaking the one line of a message.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 300 {
		s = string(r[:300]) + "…"
	}
	return s
}

// apiHost is the host that serves the API of the registry that images call host.
func apiHost(host string) string {
	if host == "docker.io" || host == "index.docker.io" {
		return "registry-1.docker.io"
	}
	return host
}

// known says whether anybody has credentials for host. A client that fetches tokens itself is not asked for its password.
func (r *Registry) known(ctx context.Context, host string) (known, sure bool) {
	if r.tokens != nil {
		// A client that fetches tokens does so for hosts of which it knows no password, too. Who cannot say whether there are tokens is not asked for the
		// password either.
		if has, err := r.tokens.HasTokens(ctx, host); err != nil || has {
			return has, !has
		}
	}
	user, secret, _ := r.lookup(ctx, host)
	return user != "" || secret != "", true
}
