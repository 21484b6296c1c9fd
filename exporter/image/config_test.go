// SPDX-License-Identifier: Apache-2.0

package image

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func diffIDs(n int) []digest.Digest {
	var ds []digest.Digest
	for i := range n {
		ds = append(ds, digest.FromString(fmt.Sprint(i)))
	}
	return ds
}

// lines makes a history from a short form: "RUN x" has a layer, "(ENV y)" has none.
func lines(short ...string) []ocispec.History {
	var hs []ocispec.History
	for _, s := range short {
		h := ocispec.History{CreatedBy: s}
		if strings.HasPrefix(s, "(") {
			h = ocispec.History{CreatedBy: strings.Trim(s, "()"), EmptyLayer: true}
		}
		hs = append(hs, h)
	}
	return hs
}

func short(hs []ocispec.History) []string {
	var out []string
	for _, h := range hs {
		s := h.CreatedBy
		if h.EmptyLayer {
			s = "(" + s + ")"
		}
		out = append(out, s)
	}
	return out
}

func TestHistory(t *testing.T) {
	for _, tc := range []struct {
		name    string
		history []ocispec.History
		base    []ocispec.History
		layers  int
		steps   []int
		want    []string
	}{
		{
			name: "all agree", history: lines("FROM", "(ENV a)", "RUN b", "COPY c"), layers: 3,
			want: []string{"FROM", "(ENV a)", "RUN b", "COPY c"},
		},
		{name: "scratch", want: nil},
		{
			name: "a RUN that changed nothing, steps known", history: lines("ADD base", "RUN true", "RUN touch x", "(CMD)"), base: lines("ADD base"),
			layers: 2, steps: []int{1, 0, 1}, want: []string{"ADD base", "(RUN true)", "RUN touch x", "(CMD)"},
		},
		{
			name: "steps known, base not", history: lines("ADD base", "(ENV a)", "WORKDIR /a", "RUN true", "COPY b"), layers: 3, steps: []int{1, 1, 0, 1},
			want: []string{"ADD base", "(ENV a)", "WORKDIR /a", "(RUN true)", "COPY b"},
		},
		{
			name: "a RUN that changed nothing, steps not known", history: lines("ADD base", "COPY a", "RUN true"), base: lines("ADD base"),
			layers: 2, want: []string{"ADD base", "COPY a", "(RUN true)"},
		},
		{
			name: "WORKDIR changes nothing before RUN does", history: lines("ADD base", "WORKDIR /a", "RUN x", "COPY y"), base: lines("ADD base"),
			layers: 3, want: []string{"ADD base", "(WORKDIR /a)", "RUN x", "COPY y"},
		},
		{
			name: "the base keeps its layers", history: lines("RUN base", "COPY a"), base: lines("RUN base"),
			layers: 1, want: []string{"RUN base", "(COPY a)"},
		},
		{
			name: "a step with two layers", history: lines("ADD base", "COPY --link a", "RUN b"), base: lines("ADD base"),
			layers: 4, steps: []int{1, 2, 1}, want: []string{"ADD base", "COPY --link a", "COPY --link a", "RUN b"},
		},
		{
			name: "layers without lines", history: lines("(ENV a)"), layers: 2,
			want: []string{"(ENV a)", "created by slipway", "created by slipway"},
		},
		{name: "no history at all", layers: 1, want: []string{"created by slipway"}},
		{
			name: "more lines than layers", history: lines("COPY a", "COPY b", "COPY c"), layers: 1,
			want: []string{"COPY a", "(COPY b)", "(COPY c)"},
		},
		{
			name: "steps that do not add up are not believed", history: lines("COPY a", "RUN b"), layers: 1, steps: []int{0, 1, 1},
			want: []string{"COPY a", "(RUN b)"},
		},
		{
			name: "steps and lines that do not match are not believed", history: lines("COPY a", "RUN b"), layers: 2, steps: []int{0, 2},
			want: []string{"COPY a", "RUN b"},
		},
		{
			name: "base with too few lines", history: lines("(CMD)", "RUN a"), base: lines("(CMD)"), layers: 3, steps: []int{2, 1},
			want: []string{"(CMD)", "created by slipway", "created by slipway", "RUN a"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := patch{diffIDs: diffIDs(tc.layers), steps: tc.steps, base: tc.base, created: time.Unix(5, 0)}
			got := p.history(tc.history)
			if diff := cmp.Diff(tc.want, short(got)); diff != "" {
				t.Error(diff)
			}
			if count(got) != tc.layers {
				t.Errorf("%d lines for %d layers", count(got), tc.layers)
			}
		})
	}
}

func TestApplyKeepsWhatItDoesNotKnow(t *testing.T) {
	in := `{"os":"linux","architecture":"amd64","config":{"Cmd":["a && b <c>"],"Healthcheck":{"Test":["x"]}},"moby.x":{"z":1,"a":[2]},"variant":"v8"}`
	out, err := patch{diffIDs: diffIDs(1), created: time.Unix(1700000000, 0).UTC()}.apply([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"architecture":"amd64","config":{"Cmd":["a && b <c>"],"Healthcheck":{"Test":["x"]}},"created":"2023-11-14T22:13:20Z",` +
		`"history":[{"created":"2023-11-14T22:13:20Z","created_by":"created by slipway","comment":"slipway.exporter.image.v0"}],` +
		`"moby.x":{"z":1,"a":[2]},"os":"linux","rootfs":{"type":"layers","diff_ids":["` + diffIDs(1)[0].String() + `"]},"variant":"v8"}`
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Error(diff)
	}
}

func TestApplyTimes(t *testing.T) {
	old, now, epoch := time.Unix(1000, 0).UTC(), time.Unix(9000, 0).UTC(), time.Unix(5000, 0).UTC()
	late := time.Unix(7000, 0).UTC()
	base := []ocispec.History{{Created: &late, CreatedBy: "ADD base"}}
	in, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		History:  []ocispec.History{base[0], {CreatedBy: "COPY a"}, {Created: &late, CreatedBy: "RUN b"}, {Created: &old, CreatedBy: "CMD", EmptyLayer: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	times := func(epoch *time.Time) (created time.Time, hs []time.Time) {
		out, err := patch{diffIDs: diffIDs(3), base: base, created: now, epoch: epoch}.apply(in)
		if err != nil {
			t.Fatal(err)
		}
		var img ocispec.Image
		if err := json.Unmarshal(out, &img); err != nil {
			t.Fatal(err)
		}
		for _, h := range img.History {
			hs = append(hs, *h.Created)
		}
		return *img.Created, hs
	}
	created, hs := times(nil)
	if diff := cmp.Diff([]time.Time{old, late, now, late, old}, append([]time.Time{created}, hs...)); diff != "" {
		t.Errorf("without an epoch: %s", diff)
	}
	created, hs = times(&epoch)
	if diff := cmp.Diff([]time.Time{old, late, epoch, epoch, old}, append([]time.Time{created}, hs...)); diff != "" {
		t.Errorf("with an epoch (the base keeps its times): %s", diff)
	}
}

func TestApplyRefuses(t *testing.T) {
	for in, say := range map[string]string{
		`{`:                         "JSON",
		`{"os":"linux"}`:            "architecture",
		`{"architecture":"amd64"}`:  "os",
		`null`:                      "os",
		`[]`:                        "image config",
		`{"os":1,"architecture":2}`: "image config",
	} {
		if _, err := (patch{}).apply([]byte(in)); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v, want it to say %q", in, err, say)
		}
	}
}

func TestAttrs(t *testing.T) {
	for _, tc := range []struct {
		given map[string]string
		err   string
		check func(attrs) bool
	}{
		{map[string]string{}, "", func(a attrs) bool { return a.store && !a.push && !a.docker }},
		{map[string]string{"name": "a, host:5000/b:1", "push": ""}, "", func(a attrs) bool { return a.push && len(a.names) == 2 }},
		{map[string]string{"name": "*", "oci-mediatypes": "false", "unpack": "true"}, "", func(a attrs) bool { return a.docker }},
		{map[string]string{"push-by-digest": "false", "registry.insecure": "0", "force-compression": "false"}, "", nil},
		{map[string]string{"source-date-epoch": "77"}, "", func(a attrs) bool { return a.epoch.Unix() == 77 }},
		{map[string]string{"source-date-epoch": ""}, "", func(a attrs) bool { return a.epochSet && a.epoch == nil }},
		{map[string]string{"name": "a", "push": "1", "compression": "gzip"}, "", nil},
		{map[string]string{"name": "a", "push": "1", "compression": "zstd", "compression-level": "22", "force-compression": ""}, "", func(a attrs) bool {
			return a.compression.Kind == "zstd" && *a.compression.Level == 22 && a.compression.Force
		}},
		{map[string]string{"compression": "gzip"}, "", func(a attrs) bool { return a.blobs() }},
		{map[string]string{"force-compression": "false"}, "", func(a attrs) bool { return !a.blobs() }},
		{map[string]string{"compression": "uncompressed"}, "", nil},
		{map[string]string{"compression": "estargz"}, "", func(a attrs) bool { return a.compression.Estargz }},
		{map[string]string{"compression": "estargz", "oci-mediatypes": "false"}, "conflicts with oci-mediatypes=false", nil},
		{map[string]string{"name": "a", "push": "1", "compression": "zstd", "oci-mediatypes": "false"}, "conflicts with oci-mediatypes=false", nil},
		{map[string]string{"name": "a", "push": "1", "compression": "zstd", "compression-level": "23"}, "zstd has 0 to 22", nil},
		{map[string]string{"name": "a", "push": "1", "compression": "estargz", "compression-level": "10"}, "gzip has 0 to 9", nil},
		{map[string]string{"name": "a", "push": "1", "compression": "bzip2"}, "compression=bzip2: not supported", nil},
		// Workflows say push=false of a pull request and leave the rest as it is.
		{map[string]string{"name": "a:1", "push-by-digest": "true", "name-canonical": "true", "registry.insecure": "true", "push": "false"}, "", nil},
		{map[string]string{"name": "a:1", "push": "1", "push-by-digest": "true"}, "has a tag", nil},
		{map[string]string{"name": "a", "push": "1", "push-by-digest": "", "registry.insecure": "1", "name-canonical": "1"}, "", func(a attrs) bool {
			return a.byDigest && a.insecure && a.canonical
		}},
		{map[string]string{"dangling-name-prefix": "team/app", "danging-name-empty-only": "true", "push": "1"}, "", func(a attrs) bool {
			return a.dangling == "docker.io/team/app" && a.danglingOnly
		}},
		{map[string]string{"dangling-name-prefix": "team/app:1"}, "without a tag or digest", nil},
		{map[string]string{"prefer-nondist-layers": "true"}, "not supported yet: prefer-nondist-layers=true", nil},
		{map[string]string{"buildinfo": "true", "buildinfo-attrs": "false"}, "", nil},
		{map[string]string{"squash": "all", "rewrite-timestamp": "true"}, "", func(a attrs) bool { return a.reshape.Squash == "all" && a.reshape.RewriteTimestamp }},
		{map[string]string{"squash": "true"}, "want all", nil},
		{map[string]string{"annotation-bad.x": "y"}, "unrecognized annotation type bad", nil},
		{map[string]string{"nonsense": "1"}, "not supported yet: nonsense=1", nil},
		{map[string]string{"push": "perhaps"}, "push=perhaps: not true or false", nil},
		{map[string]string{"push": "true"}, "push needs a name", nil},
		{map[string]string{"store": "false"}, "", func(a attrs) bool { return a.blobs() }},
		{map[string]string{"name": "UPPER"}, "UPPER", nil},
		{map[string]string{"name": "a@sha256:" + strings.Repeat("0", 64)}, "cannot have a digest", nil},
		{map[string]string{"source-date-epoch": "x"}, "source-date-epoch=x", nil},
	} {
		a, err := parseAttrs(tc.given)
		switch {
		case tc.err == "" && err != nil:
			t.Errorf("%v: %v", tc.given, err)
		case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
			t.Errorf("%v: %v, want %q", tc.given, err, tc.err)
		case tc.check != nil && !tc.check(a):
			t.Errorf("%v: %+v", tc.given, a)
		}
	}
}
