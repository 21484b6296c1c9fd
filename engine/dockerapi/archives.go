// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"bufio"
	"encoding/json"
	"net/http"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/jsonstream"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// platform reads the query parameter: one platform as JSON.
func (r *request) platform() (*ocispec.Platform, error) {
	values := r.URL.Query()["platform"]
	switch {
	case len(values) == 0 || values[0] == "":
		return nil, nil
	case len(values) > 1:
		return nil, unsupported("several platforms at once")
	}
	var p ocispec.Platform
	if err := json.Unmarshal([]byte(values[0]), &p); err != nil || p.OS == "" || p.Architecture == "" {
		return nil, invalid("invalid platform %q", values[0])
	}
	return &p, nil
}

// imageSave is GET /images/get and GET /images/NAME/get. A repository without a tag means all of its tags.
func (s *Server) imageSave(r *request, refs []string) error {
	p, err := r.platform()
	if err != nil {
		return err
	}
	if len(refs) == 0 {
		return invalid("no image was named")
	}
	var images []Saved
	for _, ref := range refs {
		saved := Saved{Ref: ref}
		named, nameErr := reference.ParseNormalizedNamed(ref)
		img, err := s.image(r, ref)
		if nameErr == nil && reference.IsNameOnly(named) {
			tags, terr := s.tagsOf(r.Context(), named)
			if terr == nil {
				for _, tag := range tags {
					images = append(images, Saved{Ref: tag.String(), Names: []string{tag.String()}})
				}
				if len(tags) > 0 {
					continue
				}
			}
		}
		if err != nil {
			return err
		}
		if _, tagged := named.(reference.Tagged); nameErr == nil && tagged && img.ID != "" {
			saved.Names = []string{named.String()}
		}
		images = append(images, saved)
	}
	out := &lateStart{w: r.w}
	buffered := bufio.NewWriterSize(out, 1<<20)
	err = s.Archives.Save(r.Context(), buffered, images, p)
	if err == nil {
		err = buffered.Flush()
	}
	if err != nil && out.begun {
		s.Log.Warn("save images", "error", err)
		panic(http.ErrAbortHandler) // so that the client sees that what it has is not whole
	}
	return err
}

// lateStart sends the headers with the first bytes, so that an error before them has a status of its own.
type lateStart struct {
	w     http.ResponseWriter
	begun bool
}

func (l *lateStart) Write(p []byte) (int, error) {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/x-tar")
		l.w.WriteHeader(http.StatusOK)
	}
	return l.w.Write(p)
}

// imageLoad is POST /images/load.
func (s *Server) imageLoad(r *request) error {
	p, err := r.platform()
	if err != nil {
		return err
	}
	out := newMessages(r.w)
	err = s.Archives.Load(r.Context(), r.Body, p, func(name string) {
		words := "Loaded image: "
		if len(name) > 7 && name[:7] == "sha256:" {
			words = "Loaded image ID: "
		}
		out.send(message{Message: jsonstream.Message{Stream: words + name + "\n"}})
	})
	if err != nil {
		return out.fail(err)
	}
	return nil
}
