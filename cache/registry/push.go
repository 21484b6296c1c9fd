// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	ctdref "github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The upload is our own, over containerd's authorizer and host description: its pusher feeds the request body
// through a pipe that nobody reads when the request fails before it is sent (a token that cannot be refreshed),
// and then waits for ever.

// SourceAnnotation, with the name of a registry host behind it, lists the repositories of that registry which
// are known to hold a blob (comma-separated), so that it can be mounted instead of sent. containerd's name.
const SourceAnnotation = "containerd.io/distribution.source."

// Push makes sure that ref's repository has the blob desc. When it does not and cannot mount it from a repository
// that desc's SourceAnnotation names, open's bytes are sent, verified on the way unless they are Stored. progress, which may be nil, is
// called with the number of bytes of this blob that have been sent; after a failed try it starts again at 0, and
// it ends at desc.Size. Blobs only: see PushManifest.
func (r *Registry) Push(ctx context.Context, ref string, desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(n int64)) error {
	named, err := Parse(ref)
	if err != nil {
		return err
	}
	if progress == nil {
		progress = func(int64) {}
	}
	u, err := r.uploader(ctx, named)
	if err != nil {
		return r.explain(ctx, "push", named, err)
	}
	var part partial
	for try := 1; ; try++ {
		before := part.at
		err = tried(u.blob(desc, open, progress, &part), try)
		if err == nil {
			progress(desc.Size)
			return nil
		}
		if part.at > before {
			try = 1 // it gets on, if slowly
		}
		if try >= r.opts.Tries || ctx.Err() != nil || !broken(err) {
			return r.explain(u.ctx, "push", named, err)
		}
		if err := r.opts.Wait(ctx, again(err, try)); err != nil {
			return err
		}
	}
}

// PushManifest stores a manifest or index under ref's tag, or under its digest when ref has no tag of its own.
// Everything that it names must be there already.
func (r *Registry) PushManifest(ctx context.Context, ref string, desc ocispec.Descriptor, content []byte) error {
	named, err := reference.ParseNormalizedNamed(ref) // no tag added: "name" alone means by digest
	if err != nil {
		return fmt.Errorf("image name %q: %w", ref, err)
	}
	if digest.FromBytes(content) != desc.Digest || int64(len(content)) != desc.Size {
		return fmt.Errorf("push %s: the manifest's bytes are not those of %s", named, desc.Digest)
	}
	u, err := r.uploader(ctx, named)
	if err != nil {
		return r.explain(ctx, "push", named, err)
	}
	for try := 1; ; try++ {
		err = tried(u.manifest(desc, content), try)
		if err == nil {
			return nil
		}
		if try >= r.opts.Tries || ctx.Err() != nil || !broken(err) {
			return r.explain(u.ctx, "push", named, err)
		}
		if err := r.opts.Wait(ctx, again(err, try)); err != nil {
			return err
		}
	}
}

// Tag stores content, the manifest or index desc, under ref's tag ("latest" when it has none).
func (r *Registry) Tag(ctx context.Context, ref string, desc ocispec.Descriptor, content []byte) error {
	named, err := Parse(ref)
	if err != nil {
		return err
	}
	return r.PushManifest(ctx, named.String(), desc, content)
}

// Tagged reports whether ref's tag ("latest" when it has none) stands for the manifest dgst already, so that it need not be sent. What the registry does not say, or says
// wrongly, is a no: sending it then tells more.
func (r *Registry) Tagged(ctx context.Context, ref string, dgst digest.Digest) bool {
	named, err := Parse(ref)
	if err != nil {
		return false
	}
	u, err := r.uploader(ctx, named)
	if err != nil {
		return false
	}
	tagged, ok := u.named.(reference.Tagged)
	if !ok {
		return false
	}
	resp, err := u.do(ctx, http.MethodHead, u.base+"manifests/"+tagged.Tag(), func(req *http.Request) error {
		req.Header.Set("Accept", strings.Join([]string{
			ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.v2+json",
			"application/vnd.docker.distribution.manifest.list.v2+json", "*/*",
		}, ", "))
		return nil
	})
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK && resp.Header.Get("Docker-Content-Digest") == dgst.String()
}

// uploader sends to one repository.
type uploader struct {
	ctx   context.Context
	named reference.Named
	host  docker.RegistryHost
	base  string // of the repository's URLs

	uploads *uploads
}

func (r *Registry) uploader(ctx context.Context, named reference.Named) (*uploader, error) {
	host, err := r.pushHost(reference.Domain(named))
	if err != nil {
		return nil, err
	}
	ctx, err = docker.ContextWithRepositoryScope(r.context(ctx), ctdref.Spec{Locator: named.Name()}, true)
	if err != nil {
		return nil, err
	}
	return &uploader{
		ctx: ctx, named: named, host: host,
		base:    host.Scheme + "://" + host.Host + host.Path + "/" + reference.Path(named) + "/",
		uploads: &r.hosts.uploads,
	}, nil
}

func (u *uploader) blob(desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64), part *partial) (err error) {
	repository := reference.Path(u.named)
	from, end, err := u.uploads.enter(u.ctx, strings.TrimSuffix(u.base, repository+"/"), desc.Digest, repository)
	if err != nil || from == repository {
		return err
	}
	if from != "" {
		desc = mountable(desc, u.named, from)
	} else {
		defer func() { end(err == nil) }()
	}
	there, err := u.has("blobs/"+desc.Digest.String(), desc)
	if err != nil || there {
		return err
	}
	if done, err := u.goOn(desc, open, progress, part); err != nil || done {
		return err
	}
	return u.send(desc, open, progress, part)
}

// send has a blob mounted that the repository does not have, or uploads it.
func (u *uploader) send(desc ocispec.Descriptor, open func() (io.ReadCloser, error), progress func(int64), part *partial) error {
	// Whatever is left of an earlier upload is the registry's to throw away; we begin a new one.
	location, done, err := u.begin(desc)
	if err != nil || done {
		return err
	}
	part.location = location
	q := location.Query()
	q.Set("digest", desc.Digest.String())
	location.RawQuery = q.Encode()
	var rc io.ReadCloser
	resp, err := u.do(u.ctx, http.MethodPut, location.String(), func(req *http.Request) (err error) {
		if rc, err = open(); err != nil {
			return err
		}
		if req.Body, err = body(rc, desc, 0, progress); err != nil {
			_ = rc.Close()
			return err
		}
		req.ContentLength = desc.Size
		if desc.Size == 0 {
			req.Body.Close()
			req.Body = http.NoBody // a body with a length of 0 would mean one of unknown length
		}
		req.Header.Set("Content-Type", "application/octet-stream")
		if desc.Size > 64<<10 {
			// So that a registry which wants another token first says so before the bytes are sent.
			req.Header.Set("Expect", "100-continue")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err = created(resp, desc); err != nil {
		part.location = nil // an answer is the end of it
	}
	return u.blame(err, rc, desc)
}

// has asks whether the registry has desc at path.
func (u *uploader) has(path string, desc ocispec.Descriptor) (bool, error) {
	resp, err := u.do(u.ctx, http.MethodHead, u.base+path, nil)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusOK:
		return resp.ContentLength < 0 || resp.ContentLength == desc.Size, nil
	case resp.StatusCode == http.StatusNotFound:
		return false, nil
	}
	return false, remoteerrors.NewUnexpectedStatusErr(resp)
}

// begin starts an upload, or has the blob mounted (done).
func (u *uploader) begin(desc ocispec.Descriptor) (location *url.URL, done bool, err error) {
	target := u.base + "blobs/uploads/"
	var resp *http.Response
	if from := u.mountSource(desc); from != "" {
		q := url.Values{"mount": {desc.Digest.String()}, "from": {from}}
		// The token must allow reading there too; a registry that refuses gives us a token without it, or none.
		resp, err = u.do(docker.ContextWithAppendPullRepositoryScope(u.ctx, from), http.MethodPost, target+"?"+q.Encode(), nil)
		switch {
		case err != nil && broken(err):
			return nil, false, err
		case err != nil:
			resp = nil
		case resp.StatusCode == http.StatusCreated:
			resp.Body.Close()
			return nil, true, nil
		case resp.StatusCode != http.StatusAccepted:
			resp.Body.Close()
			resp = nil
		}
	}
	if resp == nil {
		if resp, err = u.do(u.ctx, http.MethodPost, target, nil); err != nil {
			return nil, false, err
		}
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusCreated:
		return nil, true, nil
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
	default:
		return nil, false, remoteerrors.NewUnexpectedStatusErr(resp)
	}
	location, err = resp.Location()
	if err != nil {
		return nil, false, fmt.Errorf("the registry did not say where to upload to: %w", err)
	}
	return sameScheme(location, resp.Request.URL), false, nil
}

// mountSource is a repository of the same registry that has desc, "" when none is known.
func (u *uploader) mountSource(desc ocispec.Descriptor) string {
	for _, repo := range strings.Split(desc.Annotations[SourceAnnotation+reference.Domain(u.named)], ",") {
		if repo != "" && repo != reference.Path(u.named) {
			return repo
		}
	}
	return ""
}

func (u *uploader) manifest(desc ocispec.Descriptor, content []byte) error {
	object := desc.Digest.String()
	if tagged, ok := u.named.(reference.Tagged); ok {
		object = tagged.Tag()
	}
	resp, err := u.do(u.ctx, http.MethodPut, u.base+"manifests/"+object, func(req *http.Request) error {
		req.Body = io.NopCloser(bytes.NewReader(content))
		req.ContentLength = int64(len(content))
		req.Header.Set("Content-Type", desc.MediaType)
		return nil
	})
	if err != nil {
		return err
	}
	return created(resp, desc)
}

// created checks the answer to a PUT.
func created(resp *http.Response, desc ocispec.Descriptor) error {
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK, http.StatusCreated, http.StatusAccepted, http.StatusNoContent:
	default:
		return remoteerrors.NewUnexpectedStatusErr(resp)
	}
	if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != desc.Digest.String() {
		return fmt.Errorf("the registry stored %s as %s", desc.Digest, got)
	}
	return nil
}

// do makes a request and answers what the registry wants to know about us. fill, when set, gives the request its
// body; it is called again when the request has to be made again.
func (u *uploader) do(ctx context.Context, method, target string, fill func(*http.Request) error) (*http.Response, error) {
	const rounds = 3 // the first answer asks for a token, the second may say that the token has expired
	var responses []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, method, target, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("User-Agent", userAgent)
		if err := u.host.Authorizer.Authorize(ctx, req); err != nil {
			return nil, err
		}
		if fill != nil {
			if err := fill(req); err != nil {
				return nil, err
			}
		}
		resp, err := u.host.Client.Do(req)
		if err != nil {
			return nil, err
		}
		responses = append(responses, resp)
		if resp.StatusCode != http.StatusUnauthorized || len(responses) == rounds {
			return resp, nil
		}
		if err := u.host.Authorizer.AddResponses(ctx, responses); errdefs.IsNotImplemented(err) {
			return resp, nil
		} else if err != nil {
			resp.Body.Close()
			return nil, err
		}
		resp.Body.Close()
	}
}

// Has says whether ref's repository has the blob desc.
func (r *Registry) Has(ctx context.Context, ref string, desc ocispec.Descriptor) (bool, error) {
	named, err := Parse(ref)
	if err != nil {
		return false, err
	}
	u, err := r.uploader(ctx, named)
	if err != nil {
		return false, r.explain(ctx, "push", named, err)
	}
	there, err := u.has("blobs/"+desc.Digest.String(), desc)
	if err != nil {
		return false, r.explain(u.ctx, "push", named, err)
	}
	return there, nil
}
