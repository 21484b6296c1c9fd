// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// messages writes docker's stream of progress messages. Its methods may be called concurrently.
type messages struct {
	mu      sync.Mutex
	w       http.ResponseWriter
	flusher *http.ResponseController
	begun   bool
	last    map[digest.Digest]time.Time
}

// message is jsonstream.Message with the field that clients older than API 1.5x read errors from.
type message struct {
	jsonstream.Message
	ErrorMessage string `json:"error,omitempty"`
}

func newMessages(w http.ResponseWriter) *messages {
	return &messages{w: w, flusher: http.NewResponseController(w), last: map[digest.Digest]time.Time{}}
}

func (m *messages) send(msg message) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.begun {
		m.begun = true
		m.w.Header().Set("Content-Type", "application/json")
		m.w.WriteHeader(http.StatusOK)
	}
	enc := json.NewEncoder(m.w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(msg) // docker's clients want "\r\n" or "\n" between documents
	_ = m.flusher.Flush()
}

func (m *messages) status(id, format string, args ...any) {
	m.send(message{Message: jsonstream.Message{ID: id, Status: fmt.Sprintf(format, args...)}})
}

// fail ends the stream with err, or returns it when nothing has been sent, so that it can have a status of its own.
func (m *messages) fail(err error) error {
	m.mu.Lock()
	begun := m.begun
	m.mu.Unlock()
	if !begun {
		return err
	}
	m.send(message{Message: jsonstream.Message{Error: &jsonstream.Error{Code: status(err), Message: err.Error()}}, ErrorMessage: err.Error()})
	return nil
}

// progressInterval bounds how often one blob is reported: a terminal shows no more.
const progressInterval = 100 * time.Millisecond

// transfer reports a step, in the words that docker has for it.
func (m *messages) transfer(t Transfer, words map[TransferState]string) {
	m.mu.Lock()
	now := time.Now()
	skip := t.State == Running && now.Sub(m.last[t.Digest]) < progressInterval
	if t.State == Running && !skip {
		m.last[t.Digest] = now
	}
	m.mu.Unlock()
	if skip {
		return
	}
	msg := message{Message: jsonstream.Message{ID: shortID(t.Digest), Status: words[t.State]}}
	if t.State == Running {
		msg.Progress = &jsonstream.Progress{Current: t.Current, Total: t.Total}
	}
	m.send(msg)
}

// registryAuth reads the credentials that came with a request.
func registryAuth(r *request) (*registry.AuthConfig, error) {
	header := r.Header.Get(registry.AuthHeader)
	if header == "" {
		return nil, nil
	}
	auth, err := authconfig.Decode(header)
	if err != nil {
		return nil, invalid("invalid %s header: %v", registry.AuthHeader, err)
	}
	if *auth == (registry.AuthConfig{}) {
		return nil, nil
	}
	return auth, nil
}

// pullRef puts together the reference that fromImage and tag name; a tag may be a digest.
func pullRef(name, tag string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, invalid("invalid reference format: %q: %v", name, err)
	}
	if tag != "" {
		if d, err := digest.Parse(tag); err == nil {
			named, err = reference.WithDigest(reference.TrimNamed(named), d)
			if err != nil {
				return nil, invalid("invalid digest %q: %v", tag, err)
			}
		} else if named, err = reference.WithTag(reference.TrimNamed(named), tag); err != nil {
			return nil, invalid("invalid tag %q: %v", tag, err)
		}
	}
	if reference.IsNameOnly(named) { // docker means all tags
		return nil, unsupported("pulling all tags of " + reference.FamiliarName(named) + " (name one)")
	}
	return named, nil
}

// imageCreate pulls an image.
func (s *Server) imageCreate(r *request) error {
	if r.query("fromSrc") != "" {
		return unsupported("importing an image (fromSrc)")
	}
	if err := r.refuse("repo", "message", "changes"); err != nil {
		return err
	}
	if r.query("fromImage") == "" {
		return invalid("fromImage is missing: it names the image to pull")
	}
	ref, err := pullRef(r.query("fromImage"), r.query("tag"))
	if err != nil {
		return err
	}
	auth, err := registryAuth(r)
	if err != nil {
		return err
	}
	var platform *ocispec.Platform
	if text := r.query("platform"); text != "" {
		p, err := platforms.Parse(text)
		if err != nil {
			return invalid("invalid platform %q: %v", text, err)
		}
		platform = &p
	}
	out := newMessages(r.w)
	words := map[TransferState]string{Waiting: "Pulling fs layer", Running: "Downloading", Done: "Pull complete", Exists: "Already exists"}
	var first sync.Once
	dgst, changed, err := s.Registry.Pull(r.Context(), ref.String(), platform, auth, func(t Transfer) {
		first.Do(func() { out.status(tagOf(ref), "Pulling from %s", reference.Path(ref)) })
		out.transfer(t, words)
	})
	if err != nil {
		return out.fail(err)
	}
	first.Do(func() { out.status(tagOf(ref), "Pulling from %s", reference.Path(ref)) })
	out.status("", "Digest: %s", dgst)
	if changed {
		out.status("", "Status: Downloaded newer image for %s", reference.FamiliarString(ref))
	} else {
		out.status("", "Status: Image is up to date for %s", reference.FamiliarString(ref))
	}
	return nil
}

// tagOf is the tag of ref, or its digest.
func tagOf(ref reference.Named) string {
	switch ref := ref.(type) {
	case reference.Tagged:
		return ref.Tag()
	case reference.Digested:
		return ref.Digest().String()
	}
	return ""
}

// imagePush sends an image to its registry.
func (s *Server) imagePush(r *request) error {
	if err := r.refuse("platform"); err != nil {
		return err
	}
	named, err := reference.ParseNormalizedNamed(r.id)
	if err != nil {
		return invalid("invalid reference %q: %v", r.id, err)
	}
	auth, err := registryAuth(r)
	if err != nil {
		return err
	}
	var refs []reference.NamedTagged
	if tag := r.query("tag"); tag != "" || !reference.IsNameOnly(named) {
		ref, err := parseTag(r.id, tag)
		if err != nil {
			return err
		}
		refs = append(refs, ref)
	} else if refs, err = s.tagsOf(r.Context(), named); err != nil { // no tag means all of them
		return err
	}
	out := newMessages(r.w)
	words := map[TransferState]string{Waiting: "Preparing", Running: "Pushing", Done: "Pushed", Exists: "Layer already exists"}
	for _, ref := range refs {
		if _, err := s.image(r, ref.String()); err != nil {
			if status(err) == http.StatusNotFound {
				err = notFound("An image does not exist locally with the tag: %s", reference.FamiliarName(ref))
			}
			return out.fail(err)
		}
		var first sync.Once
		begin := func() { out.status("", "The push refers to repository [%s]", ref.Name()) }
		desc, err := s.Registry.Push(r.Context(), ref.String(), auth, func(t Transfer) {
			first.Do(begin)
			out.transfer(t, words)
		})
		if err != nil {
			return out.fail(err)
		}
		first.Do(begin)
		out.status("", "%s: digest: %s size: %d", ref.Tag(), desc.Digest, desc.Size)
		aux, err := json.Marshal(pushResult{ref.Tag(), desc.Digest.String(), desc.Size})
		if err != nil {
			return out.fail(err)
		}
		raw := json.RawMessage(aux)
		out.send(message{Message: jsonstream.Message{Aux: &raw}})
	}
	return nil
}

// pushResult is what docker's push tells programs at its end.
type pushResult struct {
	Tag    string
	Digest string
	Size   int64
}

// tagsOf are the local names of one repository.
func (s *Server) tagsOf(ctx context.Context, repo reference.Named) ([]reference.NamedTagged, error) {
	list, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []reference.NamedTagged
	for _, img := range list {
		for _, name := range img.Names {
			if named, err := reference.ParseNormalizedNamed(name); err == nil && named.Name() == repo.Name() {
				if tagged, ok := named.(reference.NamedTagged); ok {
					out = append(out, tagged)
				}
			}
		}
	}
	if len(out) == 0 {
		return nil, notFound("An image does not exist locally with the tag: %s", reference.FamiliarName(repo))
	}
	return out, nil
}

// auth checks a user's password for a registry.
func (s *Server) auth(r *request) error {
	var auth registry.AuthConfig
	if err := json.NewDecoder(http.MaxBytesReader(r.w, r.Body, 1<<20)).Decode(&auth); err != nil {
		return invalid("invalid credentials: %v", err)
	}
	token, err := s.Registry.Login(r.Context(), auth)
	if err != nil {
		return err
	}
	writeJSON(r.w, http.StatusOK, registry.AuthResponse{IdentityToken: token, Status: "Login Succeeded"})
	return nil
}
