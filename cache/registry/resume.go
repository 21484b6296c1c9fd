// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// partial is an upload that may have broken on the way.
type partial struct {
	location *url.URL // nil when there is none
	at       int64    // how many bytes the registry has said that it has
}

// goOn continues an upload where it broke, if the registry says how far it came (OCI distribution spec, "Pushing a blob in chunks"): the
// rest in one more chunk, then the end. It is not done when the registry does not play along; then a new upload is due.
func (u *uploader) goOn(desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64), part *partial) (done bool, err error) {
	if part.location == nil {
		return false, nil
	}
	location, at, ok, err := u.reached(part.location, desc)
	if err != nil {
		return false, err
	}
	part.location = nil // whatever goes wrong now goes wrong for good, unless it breaks again
	if !ok {
		return false, nil
	}
	part.at = max(part.at, at)
	if at < desc.Size {
		resp, err := u.do(u.ctx, http.MethodPatch, location.String(), func(req *http.Request) error {
			rc, err := open()
			if err != nil {
				return err
			}
			if req.Body, err = body(rc, desc, at, progress); err != nil {
				_ = rc.Close()
				return err
			}
			req.ContentLength = desc.Size - at
			req.Header.Set("Content-Type", "application/octet-stream")
			req.Header.Set("Content-Range", fmt.Sprintf("%d-%d", at, desc.Size-1))
			return nil
		})
		if err != nil {
			part.location = location
			return false, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted && resp.StatusCode != http.StatusNoContent {
			return false, nil
		}
		if next, err := resp.Location(); err == nil {
			location = sameScheme(next, resp.Request.URL)
		}
	}
	end := *location
	q := end.Query()
	q.Set("digest", desc.Digest.String())
	end.RawQuery = q.Encode()
	resp, err := u.do(u.ctx, http.MethodPut, end.String(), func(req *http.Request) error {
		req.Header.Set("Content-Type", "application/octet-stream")
		return nil
	})
	if err != nil {
		part.location = location
		return false, err
	}
	if resp.StatusCode >= 400 && resp.StatusCode < 500 {
		resp.Body.Close()
		return false, nil // it has put other bytes together: again from the start
	}
	return true, created(resp, desc)
}

// reached asks how far an upload has come.
func (u *uploader) reached(location *url.URL, desc ocispec.Descriptor) (next *url.URL, at int64, ok bool, err error) {
	resp, err := u.do(u.ctx, http.MethodGet, location.String(), nil)
	if err != nil {
		return nil, 0, false, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 500:
		return nil, 0, false, remoteerrors.NewUnexpectedStatusErr(resp)
	case resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusAccepted && resp.StatusCode != http.StatusOK:
		return nil, 0, false, nil
	}
	first, last, found := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-")
	n, err := strconv.ParseInt(last, 10, 64)
	// A range of 0-0 may mean one byte or none, depending on who says it: no loss to begin again.
	if !found || first != "0" || err != nil || n <= 0 || n >= desc.Size {
		return nil, 0, false, nil
	}
	if next, err = resp.Location(); err != nil {
		next = location
	}
	return sameScheme(next, location), n + 1, true, nil
}

// sameScheme stays with TLS: registries behind a proxy that does it like to name themselves by http.
func sameScheme(location, asked *url.URL) *url.URL {
	if asked.Scheme == "https" && location.Scheme == "http" && location.Host == asked.Host {
		location.Scheme = "https"
	}
	return location
}
