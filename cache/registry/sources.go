// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"maps"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// sourcesBucket of the record database has the repositories ("HOST REPOSITORY", one a line) that are known to hold a blob.
const sourcesBucket = "blob-sources"

// maxSources is how many repositories are remembered for a blob.
const maxSources = 8

// Sources remembers which repositories hold which blobs, so that a push to another repository of the same registry
// mounts them instead of sending them. It is a hint: one that is wrong or lost costs an upload. It may be used concurrently.
type Sources struct {
	Values interface {
		GetValue(bucket, key string) ([]byte, bool, error)
		ChangeValues(bucket string, change map[string][]byte) error
	}
}

// Add notes that ref's repository holds blobs.
func (s Sources) Add(ref string, blobs ...digest.Digest) error {
	named, err := Parse(ref)
	if err != nil {
		return err
	}
	line := reference.Domain(named) + " " + reference.Path(named)
	change := map[string][]byte{}
	for _, b := range blobs {
		lines, err := s.lines(b)
		if err != nil {
			return err
		}
		if len(lines) > 0 && lines[0] == line {
			continue
		}
		lines = slices.DeleteFunc(lines, func(l string) bool { return l == line })
		lines = append([]string{line}, lines...)
		change[b.String()] = []byte(strings.Join(lines[:min(len(lines), maxSources)], "\n"))
	}
	if len(change) == 0 {
		return nil
	}
	return s.Values.ChangeValues(sourcesBucket, change)
}

// Annotate returns desc with the SourceAnnotation for ref's registry. It is for Push, not for a manifest.
func (s Sources) Annotate(ref string, desc ocispec.Descriptor) ocispec.Descriptor {
	named, err := Parse(ref)
	if err != nil {
		return desc
	}
	lines, err := s.lines(desc.Digest)
	if err != nil {
		return desc
	}
	var repos []string
	for _, l := range lines {
		if host, repo, ok := strings.Cut(l, " "); ok && host == reference.Domain(named) {
			repos = append(repos, repo)
		}
	}
	if len(repos) > 0 {
		desc.Annotations = maps.Clone(desc.Annotations)
		if desc.Annotations == nil {
			desc.Annotations = map[string]string{}
		}
		desc.Annotations[SourceAnnotation+reference.Domain(named)] = strings.Join(repos, ",")
	}
	return desc
}

func (s Sources) lines(b digest.Digest) ([]string, error) {
	raw, ok, err := s.Values.GetValue(sourcesBucket, b.String())
	if err != nil || !ok || len(raw) == 0 {
		return nil, err
	}
	return strings.Split(string(raw), "\n"), nil
}
