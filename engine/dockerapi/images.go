// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"

	cacheimage "github.com/seed-68981b69/slipway/cache/image"
)

// config reads the image's config.
func (i Image) config() (dockerspec.DockerOCIImage, error) {
	var cfg dockerspec.DockerOCIImage
	if err := json.Unmarshal(i.Config, &cfg); err != nil {
		return cfg, fmt.Errorf("config of image %s: %w", i.ID, err)
	}
	return cfg, nil
}

// familiar shortens references as docker shows them: without the default registry.
func familiar(refs []string) []string {
	out := make([]string, 0, len(refs))
	for _, ref := range refs {
		if named, err := reference.ParseNormalizedNamed(ref); err == nil {
			ref = reference.FamiliarString(named)
		}
		out = append(out, ref)
	}
	return out
}

// image finds an image or answers as docker does when there is none.
func (s *Server) image(r *request, ref string) (Image, error) {
	img, err := s.Images.Get(r.Context(), ref)
	if errors.Is(err, cacheimage.ErrNotFound) {
		return Image{}, noSuchImage(ref)
	}
	return img, err
}

// noSuchImage has the words that clients look for, and what to do.
func noSuchImage(ref string) error {
	if named, err := reference.ParseNormalizedNamed(ref); err == nil && !isHex(ref) {
		ref = reference.FamiliarString(reference.TagNameOnly(named))
	}
	return notFound("No such image: %s", ref)
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

func (s *Server) imageList(r *request) error {
	if err := r.refuse("shared-size", "manifests", "identity"); err != nil {
		return err
	}
	filters, err := parseFilters(r.query("filters"), "dangling", "label", "reference", "before", "since", "until")
	if err != nil {
		return err
	}
	if ref := r.query("filter"); ref != "" { // before 1.25
		filters["reference"] = append(filters["reference"], ref)
	}
	list, err := s.Images.List(r.Context())
	if err != nil {
		return err
	}
	keep, err := s.imageFilter(r, filters)
	if err != nil {
		return err
	}
	used := map[digest.Digest]int64{}
	for _, c := range s.list() {
		used[c.image.ID]++
	}
	out := []image.Summary{}
	for _, img := range list {
		cfg, err := img.config()
		if err != nil {
			return err
		}
		if !keep(&img, cfg) {
			continue
		}
		sum := image.Summary{
			ID:          img.ID.String(),
			Containers:  used[img.ID],
			Labels:      cfg.Config.Labels,
			RepoTags:    familiar(img.Names),
			RepoDigests: familiar(img.Digests),
			SharedSize:  -1,
			Size:        img.Size,
		}
		if cfg.Created != nil {
			sum.Created = cfg.Created.Unix()
		}
		out = append(out, sum)
	}
	slices.SortStableFunc(out, func(a, b image.Summary) int { return cmp.Compare(b.Created, a.Created) })
	writeJSON(r.w, http.StatusOK, out)
	return nil
}

// imageFilter turns docker's filters into a predicate. A reference filter also narrows the names that are shown.
func (s *Server) imageFilter(r *request, filters map[string][]string) (func(*Image, dockerspec.DockerOCIImage) bool, error) {
	var before, after time.Time
	created := func(img Image) (time.Time, error) {
		cfg, err := img.config()
		if err != nil || cfg.Created == nil {
			return time.Time{}, err
		}
		return *cfg.Created, nil
	}
	for _, ref := range filters["before"] {
		img, err := s.image(r, ref)
		if err != nil {
			return nil, err
		}
		if before, err = created(img); err != nil {
			return nil, err
		}
	}
	for _, ref := range filters["since"] {
		img, err := s.image(r, ref)
		if err != nil {
			return nil, err
		}
		if after, err = created(img); err != nil {
			return nil, err
		}
	}
	for _, text := range filters["until"] {
		t, err := parseUntil(text, time.Now())
		if err != nil {
			return nil, err
		}
		if before.IsZero() || t.Before(before) {
			before = t
		}
	}
	for _, pattern := range filters["reference"] {
		if _, err := path.Match(pattern, ""); err != nil {
			return nil, invalid("invalid filter 'reference=%s': %v", pattern, err)
		}
	}
	var dangling *bool
	for _, text := range filters["dangling"] {
		var b bool
		switch text {
		case "1", "true":
			b = true
		case "0", "false":
		default:
			return nil, invalid("invalid filter 'dangling=%s'", text)
		}
		dangling = &b
	}
	return func(img *Image, cfg dockerspec.DockerOCIImage) bool {
		if dangling != nil && *dangling != (len(img.Names) == 0) {
			return false
		}
		if !matchLabels(filters["label"], cfg.Config.Labels) {
			return false
		}
		if cfg.Created != nil {
			if !before.IsZero() && !cfg.Created.Before(before) || !after.IsZero() && !cfg.Created.After(after) {
				return false
			}
		}
		if patterns := filters["reference"]; len(patterns) > 0 {
			match := func(ref string) bool {
				named, err := reference.ParseNormalizedNamed(ref)
				if err != nil {
					return false
				}
				for _, pattern := range patterns {
					if ok, _ := reference.FamiliarMatch(pattern, named); ok {
						return true
					}
				}
				return false
			}
			img.Names = slices.DeleteFunc(slices.Clone(img.Names), func(n string) bool { return !match(n) })
			img.Digests = slices.DeleteFunc(slices.Clone(img.Digests), func(n string) bool { return !match(n) })
			return len(img.Names)+len(img.Digests) > 0
		}
		return true
	}, nil
}

// parseUntil reads a time or an age before now.
func parseUntil(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), nil
	}
	for _, form := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02"} {
		if t, err := time.Parse(form, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, invalid("invalid filter 'until=%s'", text)
}

// parseFilters reads docker's filters: a JSON object of lists, or of sets. Filters that are not known are refused.
func parseFilters(text string, known ...string) (map[string][]string, error) {
	out := map[string][]string{}
	if text == "" {
		return out, nil
	}
	var sets map[string]map[string]bool
	if err := json.Unmarshal([]byte(text), &sets); err == nil {
		for name, set := range sets {
			for value, on := range set {
				if on {
					out[name] = append(out[name], value)
				}
			}
			slices.Sort(out[name])
		}
	} else if err := json.Unmarshal([]byte(text), &out); err != nil { // before 1.22
		return nil, invalid("invalid filters: %v", err)
	}
	for name := range out {
		if !slices.Contains(known, name) {
			return nil, invalid("invalid filter '%s'", name)
		}
	}
	return out, nil
}

// matchLabels wants each of "key" and "key=value" in labels.
func matchLabels(wanted []string, labels map[string]string) bool {
	for _, w := range wanted {
		key, value, exact := strings.Cut(w, "=")
		got, ok := labels[key]
		if !ok || exact && got != value {
			return false
		}
	}
	return true
}

func (s *Server) imageInspect(r *request) error {
	if err := r.refuse("manifests", "platform"); err != nil {
		return err
	}
	img, err := s.image(r, r.id)
	if err != nil {
		return err
	}
	cfg, err := img.config()
	if err != nil {
		return err
	}
	res := image.InspectResponse{
		ID:           img.ID.String(),
		RepoTags:     familiar(img.Names),
		RepoDigests:  familiar(img.Digests),
		Author:       cfg.Author,
		Config:       &cfg.Config,
		Architecture: cfg.Architecture,
		Variant:      cfg.Variant,
		Os:           cfg.OS,
		OsVersion:    cfg.OSVersion,
		Size:         img.Size,
		RootFS:       image.RootFS{Type: cfg.RootFS.Type},
	}
	if cfg.Created != nil {
		res.Created = cfg.Created.Format(time.RFC3339Nano)
	}
	for _, d := range cfg.RootFS.DiffIDs {
		res.RootFS.Layers = append(res.RootFS.Layers, d.String())
	}
	if n := len(cfg.History); n > 0 {
		res.Comment = cfg.History[n-1].Comment
	}
	if img.Target.Digest != "" {
		target := img.Target
		res.Descriptor = &target
	}
	writeJSON(r.w, http.StatusOK, res)
	return nil
}

func (s *Server) imageHistory(r *request) error {
	if err := r.refuse("platform"); err != nil {
		return err
	}
	img, err := s.image(r, r.id)
	if err != nil {
		return err
	}
	cfg, err := img.config()
	if err != nil {
		return err
	}
	sizes, err := s.Images.LayerSizes(r.Context(), img)
	if err != nil {
		return err
	}
	out := []image.HistoryResponseItem{}
	layer := 0
	for _, h := range cfg.History {
		item := image.HistoryResponseItem{ID: "<missing>", CreatedBy: h.CreatedBy, Comment: h.Comment}
		if h.Created != nil {
			item.Created = h.Created.Unix()
		}
		if !h.EmptyLayer {
			if layer < len(sizes) {
				item.Size = sizes[layer]
			}
			layer++
		}
		out = append(out, item)
	}
	// A config need not tell its history; its layers are shown all the same.
	for ; layer < len(sizes); layer++ {
		out = append(out, image.HistoryResponseItem{ID: "<missing>", Size: sizes[layer]})
	}
	slices.Reverse(out)
	if len(out) > 0 {
		out[0].ID = img.ID.String()
		out[0].Tags = familiar(img.Names)
	}
	writeJSON(r.w, http.StatusOK, out)
	return nil
}

// parseTag reads the name an image is to have: repo and tag are parameters of their own in the API.
func parseTag(repo, tag string) (reference.NamedTagged, error) {
	named, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return nil, invalid("invalid reference %q: %v", repo, err)
	}
	if _, ok := named.(reference.Digested); ok {
		return nil, invalid("refusing to create a tag with a digest reference")
	}
	if tag != "" {
		tagged, err := reference.WithTag(reference.TrimNamed(named), tag)
		if err != nil {
			return nil, invalid("invalid tag %q: %v", tag, err)
		}
		return tagged, nil
	}
	return reference.TagNameOnly(named).(reference.NamedTagged), nil
}

func (s *Server) imageTag(r *request) error {
	img, err := s.image(r, r.id)
	if err != nil {
		return err
	}
	name, err := parseTag(r.query("repo"), r.query("tag"))
	if err != nil {
		return err
	}
	if err := s.Images.Tag(r.Context(), img, name.String()); err != nil {
		return err
	}
	r.w.WriteHeader(http.StatusCreated)
	return nil
}

// imageRemove takes a name from an image and deletes the image with its last name. By ID it deletes the image, which must
// be forced when names of several repositories would go. Images of containers stay unless forced, those of running
// containers always.
func (s *Server) imageRemove(r *request) error {
	if err := r.refuse("platforms"); err != nil {
		return err
	}
	ctx := r.Context()
	force := r.bool("force")
	img, err := s.image(r, r.id)
	if err != nil {
		return err
	}
	out := []image.DeleteResponse{}
	name := "" // stays empty when the image is named by ID or digest
	if named, err := reference.ParseNormalizedNamed(r.id); err == nil {
		if want := reference.TagNameOnly(named).String(); slices.Contains(img.Names, want) {
			name = want
		}
	}
	byID := name == ""
	if !byID && len(img.Names) > 1 {
		if err := s.Images.Untag(ctx, name); err != nil {
			return err
		}
		out = append(out, image.DeleteResponse{Untagged: familiar([]string{name})[0]})
		writeJSON(r.w, http.StatusOK, out)
		return nil
	}
	if byID && len(repositories(img.Names)) > 1 && !force {
		return conflict("conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories", shortID(img.ID))
	}
	what := fmt.Sprintf("unable to delete %s", shortID(img.ID))
	if !byID {
		what = fmt.Sprintf("unable to remove repository reference %q", familiar([]string{name})[0])
	}
	for _, c := range s.list() {
		switch {
		case c.image.ID != img.ID:
		case c.summaryState() == container.StateRunning:
			return conflict("conflict: %s (cannot be forced) - image is being used by running container %s", what, c.id[:12])
		case !force:
			if byID {
				return conflict("conflict: %s (must be forced) - image is being used by stopped container %s", what, c.id[:12])
			}
			return conflict("conflict: %s (must force) - container %s is using its referenced image %s", what, c.id[:12], shortID(img.ID))
		}
	}
	if err := s.Images.Delete(ctx, img); err != nil {
		return err
	}
	for _, n := range append(familiar(img.Names), familiar(img.Digests)...) {
		out = append(out, image.DeleteResponse{Untagged: n})
	}
	out = append(out, image.DeleteResponse{Deleted: img.ID.String()})
	writeJSON(r.w, http.StatusOK, out)
	return nil
}

// repositories are the different names without their tags.
func repositories(names []string) []string {
	var out []string
	for _, n := range names {
		if named, err := reference.ParseNormalizedNamed(n); err == nil {
			n = named.Name()
		}
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

func shortID(d digest.Digest) string {
	hex := d.Encoded()
	return hex[:min(12, len(hex))]
}
