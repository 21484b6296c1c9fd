// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// historyComment marks the lines of a history that no instruction of the frontend accounts for.
const historyComment = "slipway.exporter.image.v0"

// patch makes an image's config out of the frontend's. Everything stays as it is, also what we do not know, but
// for the list of layers, the history, which gets one line for each layer, and the times that are missing.
type patch struct {
	diffIDs []digest.Digest
	// steps says how many layers each step of the build has made, lowest first, beginning with the source; nil when
	// that is not known.
	steps []int
	// base is the history of the image that the build began with.
	base []ocispec.History
	// created is for the lines and the image that have no time; epoch, when set, is the latest time allowed.
	created time.Time
	epoch   *time.Time
}

func (p patch) apply(config []byte) ([]byte, error) {
	doc := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &doc); err != nil {
		return nil, fmt.Errorf("image config from the frontend: %w", err)
	}
	var known struct {
		OS           string            `json:"os"`
		Architecture string            `json:"architecture"`
		Created      *time.Time        `json:"created"`
		History      []ocispec.History `json:"history"`
	}
	if err := json.Unmarshal(config, &known); err != nil {
		return nil, fmt.Errorf("image config from the frontend: %w", err)
	}
	if known.OS == "" || known.Architecture == "" {
		return nil, fmt.Errorf("image config from the frontend: os and architecture must be set")
	}
	history := p.history(known.History)
	created := known.Created
	if created == nil {
		created = &p.created
		// Like BuildKit: the image is as old as its newest layer or instruction.
		if n := len(history); n > 0 && history[n-1].Created != nil {
			created = history[n-1].Created
		}
	}
	if p.epoch != nil && created.After(*p.epoch) {
		created = p.epoch
	}
	diffIDs := p.diffIDs
	if diffIDs == nil {
		diffIDs = []digest.Digest{}
	}
	for key, value := range map[string]any{
		"rootfs":  ocispec.RootFS{Type: "layers", DiffIDs: diffIDs},
		"history": history,
		"created": created,
	} {
		raw, err := marshal(value)
		if err != nil {
			return nil, err
		}
		doc[key] = raw
	}
	return marshal(doc) // maps are written in the order of their keys
}

// history returns lines with exactly one that is not empty for each layer.
func (p patch) history(lines []ocispec.History) []ocispec.History {
	lines = append([]ocispec.History{}, lines...)
	base := min(len(p.base), len(lines))
	source := base
	if len(p.base) == 0 && len(p.steps) > 0 {
		source = linesOf(lines, p.steps[0]) // the frontend does not say what a named context in a stage's place has brought
	}
	if !exact(lines, source, p.steps) || !p.bySteps(&lines, source) {
		p.byCount(&lines, base)
	}
	fresh := false // past what the base image brought
	for i := range lines {
		h := &lines[i]
		if !fresh && i < base && reflect.DeepEqual(*h, p.base[i]) {
			continue // its times are its own, also under an epoch (buildkit#4614)
		}
		fresh = true
		if h.Created == nil {
			h.Created = &p.created
		}
		if p.epoch != nil && h.Created.After(*p.epoch) {
			h.Created = p.epoch
		}
	}
	return lines
}

// exact says that there is one line, not marked as empty, for each step after the source.
func exact(lines []ocispec.History, base int, steps []int) bool {
	return len(steps) > 0 && count(lines[base:]) == len(steps)-1
}

// linesOf is how many lines the first layers take.
func linesOf(lines []ocispec.History, layers int) int {
	for i := range lines {
		if layers == 0 {
			return i
		}
		if !lines[i].EmptyLayer {
			layers--
		}
	}
	return len(lines)
}

func count(lines []ocispec.History) (layers int) {
	for _, h := range lines {
		if !h.EmptyLayer {
			layers++
		}
	}
	return layers
}

// bySteps gives each line the layers of its step: none makes it empty, several add lines behind it.
func (p patch) bySteps(lines *[]ocispec.History, base int) bool {
	total := 0
	for _, n := range p.steps {
		total += n
	}
	if total != len(p.diffIDs) {
		return false
	}
	out := fit((*lines)[:base:base], p.steps[0])
	step := 0
	for _, h := range (*lines)[base:] {
		if h.EmptyLayer {
			out = append(out, h)
			continue
		}
		step++
		h.EmptyLayer = p.steps[step] == 0
		out = append(out, h)
		for range p.steps[step] - 1 {
			h.Comment = historyComment
			out = append(out, h)
		}
	}
	*lines = out
	return true
}

// byCount makes the numbers agree when it is not known which step has made what: the base image keeps its layers, then
// those instructions are taken to have changed nothing that most often do.
func (p patch) byCount(lines *[]ocispec.History, base int) {
	ls := *lines
	for excess := count(ls) - len(p.diffIDs); excess > 0; excess-- {
		best := -1
		for i := len(ls) - 1; i >= 0; i-- {
			if ls[i].EmptyLayer {
				continue
			}
			if best < 0 || i >= base && rank(ls[i]) > rank(ls[best]) {
				best = i
			}
		}
		ls[best].EmptyLayer = true
	}
	*lines = fit(ls, len(p.diffIDs))
}

// rank is how likely an instruction is to have changed nothing.
func rank(h ocispec.History) int {
	switch {
	case strings.HasPrefix(h.CreatedBy, "WORKDIR"):
		return 2
	case strings.HasPrefix(h.CreatedBy, "RUN"):
		return 1
	}
	return 0
}

// fit adds lines until there is one for each of layers, or empties the last ones.
func fit(lines []ocispec.History, layers int) []ocispec.History {
	for n := count(lines); n < layers; n++ {
		lines = append(lines, ocispec.History{CreatedBy: "created by slipway", Comment: historyComment})
	}
	for i, n := len(lines)-1, count(lines); n > layers; i-- {
		if !lines[i].EmptyLayer {
			lines[i].EmptyLayer = true
			n--
		}
	}
	return lines
}

// marshal writes JSON as image tools do, with < and & as they are.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
