// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	intoto "github.com/in-toto/in-toto-golang/in_toto"
	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	bkresult "github.com/moby/buildkit/solver/result"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
	"github.com/seed-68981b69/slipway/exporter/attestation"
)

// attested is an image with what is said about it, read from a layout.
type attested struct {
	target     ocispec.Descriptor
	index      ocispec.Index
	manifests  []ocispec.Manifest // of the platforms
	about      []ocispec.Manifest // the attestation manifests, in the order of manifests
	statements [][]statement      // of each of about
}

type statement = attestation.Statement

// readAttested reads an image by way of read, and checks everything that holds for all images with attestations.
func readAttested(t *testing.T, target string, read func(digest.Digest) []byte) attested {
	t.Helper()
	a := attested{target: ocispec.Descriptor{Digest: digest.Digest(target)}}
	decode(t, read(a.target.Digest), &a.index)
	subjects := map[digest.Digest]int{}
	for _, d := range a.index.Manifests {
		raw := read(d.Digest)
		if int64(len(raw)) != d.Size || digest.FromBytes(raw) != d.Digest {
			t.Errorf("manifest %s is not what the index says", d.Digest)
		}
		var m ocispec.Manifest
		decode(t, raw, &m)
		if d.Annotations["vnd.docker.reference.type"] == "" {
			if d.Platform == nil || d.Platform.OS != "linux" {
				t.Errorf("a manifest for platform %v", d.Platform)
			}
			subjects[d.Digest] = len(a.manifests)
			a.manifests = append(a.manifests, m)
			continue
		}
		about := digest.Digest(d.Annotations["vnd.docker.reference.digest"])
		if i, ok := subjects[about]; !ok || i != len(a.about) || d.Annotations["vnd.docker.reference.type"] != "attestation-manifest" {
			t.Errorf("attestation manifest with annotations %v", d.Annotations)
		}
		if d.Platform == nil || d.Platform.OS != "unknown" || d.Platform.Architecture != "unknown" {
			t.Errorf("attestation manifest for platform %v", d.Platform)
		}
		var list []statement
		for _, l := range m.Layers {
			data := read(l.Digest)
			var s statement
			decode(t, data, &s)
			if digest.FromBytes(data) != l.Digest || l.MediaType != "application/vnd.in-toto+json" || l.Annotations["in-toto.io/predicate-type"] != s.PredicateType {
				t.Errorf("statement %+v of type %s", l, s.PredicateType)
			}
			if s.Type != "https://in-toto.io/Statement/v1" {
				t.Errorf("statement of type %s", s.Type)
			}
			list = append(list, s)
		}
		if m.Subject != nil && m.Subject.Digest != about {
			t.Errorf("subject %v", m.Subject)
		}
		a.about = append(a.about, m)
		a.statements = append(a.statements, list)
	}
	return a
}

// fromArchive reads the blobs of an OCI archive.
func fromArchive(t *testing.T, raw []byte) func(digest.Digest) []byte {
	files := untar(t, raw)
	return func(d digest.Digest) []byte {
		data, ok := files["blobs/sha256/"+d.Encoded()]
		if !ok {
			t.Errorf("blob %s is not in the archive", d)
		}
		return data
	}
}

// materialDockerfile names one image only: BuildKit's frontend has a data race when it resolves several. It has a source of every kind but git, and secrets of every kind.
const materialDockerfile = `FROM scratch AS tools
ADD http://user:sesame@%[1]s/file /fetched
FROM base
ARG WITH=none
ARG PROXY
RUN --mount=type=secret,id=token echo $WITH $PROXY > /made && test -s /run/secrets/token
COPY --from=tools /fetched /
COPY top /
`

// serveFile serves one file and returns its host:port.
func serveFile(t *testing.T, text string) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

// buildAttested builds a Dockerfile with a secret and exports it.
func (te *testEngine) buildAttested(dockerfile string, attrs map[string]string, exports ...bkclient.ExportEntry) (map[string]string, error) {
	te.t.Helper()
	dir := te.t.TempDir()
	for name, text := range map[string]string{"Dockerfile": dockerfile, "top": "top"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			te.t.Fatal(err)
		}
	}
	files, err := fsutil.NewFS(dir)
	if err != nil {
		te.t.Fatal(err)
	}
	secrets := secretsprovider.FromMap(map[string][]byte{"token": []byte("hunter2")})
	response, err := te.client.Solve(te.t.Context(), nil, bkclient.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: attrs, Exports: exports, Session: []session.Attachable{secrets},
		LocalMounts: map[string]fsutil.FS{"context": files, "dockerfile": files},
	}, nil)
	if err != nil {
		return nil, err
	}
	return response.ExporterResponse, nil
}

func TestProvenance(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts and containers")
	}
	te := openWith(t, Options{Root: t.TempDir(), Provenance: map[string]any{"rack": "seven"}})
	te.base()
	host := serveFile(t, "from afar")
	dockerfile := fmt.Sprintf(materialDockerfile, host)
	attrs := func(provenance string) map[string]string {
		a := map[string]string{
			"build-arg:WITH": "wind", "build-arg:PROXY": "http://me:abracadabra@proxy.test:3128", "label:l": "v", "image-resolve-mode": "default",
			"vcs:source": "https://me:alohomora@host.test/repo.git", "vcs:revision": "abc", "filename": "Dockerfile",
		}
		if provenance != "none" {
			a["attest:provenance"] = provenance
		}
		return a
	}
	export := func(t *testing.T, provenance string, out map[string]string) (map[string]string, attested, []byte) {
		t.Helper()
		entry, archive := toBuffer("oci", out)
		response, err := te.buildAttested(dockerfile, attrs(provenance), entry)
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{"hunter2", "sesame", "alohomora"} {
			if secret != "sesame" && strings.Contains(archive.String(), secret) { // the line of the Dockerfile has that one
				t.Errorf("the archive has %q in it", secret)
			}
		}
		return response, readAttested(t, response["containerimage.digest"], fromArchive(t, archive.Bytes())), archive.Bytes()
	}

	t.Run("max", func(t *testing.T) {
		_, a, _ := export(t, "mode=max,builder-id=https://ci.test/1,reproducible=true", map[string]string{"name": "example.test/app:1,other"})
		if len(a.manifests) != 1 || len(a.about) != 1 || len(a.statements[0]) != 1 {
			t.Fatalf("%d manifests, %d attestation manifests", len(a.manifests), len(a.about))
		}
		if m := a.about[0]; m.ArtifactType != "application/vnd.docker.attestation.manifest.v1+json" || m.Config.Digest != ocispec.DescriptorEmptyJSON.Digest || m.Subject == nil {
			t.Errorf("attestation manifest %+v", m)
		}
		s := a.statements[0][0]
		image := a.index.Manifests[0].Digest
		var names []string
		for _, sub := range s.Subject {
			if sub.Digest["sha256"] != image.Encoded() {
				t.Errorf("subject %v, want %s", sub, image)
			}
			names = append(names, sub.Name)
		}
		if want := []string{"pkg:docker/example.test/app@1?platform=linux%2Famd64", "pkg:docker/other@latest?platform=linux%2Famd64"}; !slices.Equal(names, want) {
			t.Errorf("subjects %v", names)
		}
		if s.PredicateType != "https://slsa.dev/provenance/v1" {
			t.Errorf("predicate type %s", s.PredicateType)
		}
		var p types.ProvenancePredicateSLSA1
		decode(t, s.Predicate, &p)
		request := p.BuildDefinition.ExternalParameters.Request
		if p.BuildDefinition.BuildType != types.BuildKitBuildType1 || p.RunDetails.Builder.ID != "https://ci.test/1" || request.Frontend != "dockerfile.v0" || request.CompatibilityVersion != 30 {
			t.Errorf("definition %+v", p.BuildDefinition)
		}
		for key, want := range map[string]string{
			"build-arg:WITH": "wind", "build-arg:PROXY": "http://xxxxx:xxxxx@proxy.test:3128", "label:l": "v",
			"attest:provenance": "", "image-resolve-mode": "", "vcs:source": "",
		} {
			if request.Args[key] != want {
				t.Errorf("argument %s: %q, want %q", key, request.Args[key], want)
			}
		}
		if len(request.Secrets) != 1 || request.Secrets[0].ID != "token" || len(request.Locals) != 2 {
			t.Errorf("secrets %v, locals %v", request.Secrets, request.Locals)
		}
		got := map[string]string{}
		for _, m := range p.BuildDefinition.ResolvedDependencies {
			got[m.URI] = m.Digest["sha256"]
		}
		if len(got) != 2 || got["http://xxxxx:xxxxx@"+host+"/file"] != digest.FromString("from afar").Encoded() || len(got["pkg:docker/base@latest?platform=linux%2Famd64"]) != 64 {
			t.Errorf("materials %v", got)
		}
		md := p.RunDetails.Metadata
		if md == nil || md.InvocationID == "" || md.StartedOn == nil || md.FinishedOn == nil || md.FinishedOn.Before(*md.StartedOn) || !md.Reproducible || md.Hermetic || !md.Completeness.Request || md.Completeness.ResolvedDependencies {
			t.Errorf("metadata %+v", md)
		}
		if md.BuildKitMetadata.VCS["source"] != "https://xxxxx:xxxxx@host.test/repo.git" || md.BuildKitMetadata.VCS["revision"] != "abc" {
			t.Errorf("vcs %v", md.BuildKitMetadata.VCS)
		}
		in := p.BuildDefinition.InternalParameters
		if in.BuilderPlatform != "linux/amd64" || in.TargetPlatform != "linux/amd64" || in.DockerfileVersion == "" || in.BuildConfig == nil {
			t.Fatalf("internal parameters %+v", in)
		}
		if in.ProvenanceCustomEnv["rack"] != "seven" {
			t.Errorf("the administrator's facts: %v", in.ProvenanceCustomEnv)
		}
		steps := in.BuildConfig.Definition
		if len(steps) != len(in.BuildConfig.DigestMapping) || len(steps) < 6 {
			t.Errorf("%d steps, %d digests", len(steps), len(in.BuildConfig.DigestMapping))
		}
		for _, secret := range []string{"hunter2", "abracadabra", "alohomora", "sesame"} {
			if strings.Contains(string(s.Predicate), secret) {
				t.Errorf("%q is in the predicate", secret)
			}
		}
		src := md.BuildKitMetadata.Source
		if src == nil || len(src.Infos) != 1 || string(src.Infos[0].Data) != dockerfile || src.Infos[0].Filename != "Dockerfile" || len(src.Locations) < 4 {
			t.Errorf("source %+v", src)
		}
		// Each step says which layers it has left; the last has all of the image.
		last := steps[len(steps)-1].Inputs[0]
		chain := md.BuildKitMetadata.Layers[last]
		if len(chain) != 1 || len(chain[0]) != len(a.manifests[0].Layers) || chain[0][0].Digest != a.manifests[0].Layers[0].Digest {
			t.Errorf("layers of %s: %v, want %v", last, chain, a.manifests[0].Layers)
		}
		if n := len(md.BuildKitMetadata.Layers); n < 4 {
			t.Errorf("layers are told of %d steps", n)
		}
		for _, step := range steps {
			if s := step.Op.GetSource(); s != nil && strings.Contains(s.Identifier, "sesame") {
				t.Errorf("credentials in step %s: %s", step.ID, s.Identifier)
			}
		}
	})

	t.Run("min v0.2, as an image", func(t *testing.T) {
		_, a, _ := export(t, "mode=min,version=v0.2", map[string]string{"oci-artifact": "false"})
		m := a.about[0]
		if m.ArtifactType != "" || m.Subject != nil || m.Config.MediaType != ocispec.MediaTypeImageConfig {
			t.Errorf("attestation manifest %+v", m)
		}
		s := a.statements[0][0]
		if s.PredicateType != "https://slsa.dev/provenance/v0.2" || len(s.Subject) != 0 {
			t.Errorf("predicate type %s, subjects %v", s.PredicateType, s.Subject)
		}
		var p types.ProvenancePredicateSLSA02
		decode(t, s.Predicate, &p)
		if p.BuildType != types.BuildKitBuildType02 || p.BuildConfig != nil || len(p.Materials) != 2 || p.Metadata.BuildKitMetadata.Source != nil {
			t.Errorf("predicate %+v", p)
		}
		if p.Invocation.Parameters.Secrets != nil || p.Metadata.Completeness.Parameters || p.Invocation.Environment.Platform != "linux/amd64" || p.Invocation.ConfigSource.EntryPoint != "Dockerfile" {
			t.Errorf("invocation %+v", p.Invocation)
		}
		for key := range p.Invocation.Parameters.Args {
			if strings.HasPrefix(key, "build-arg:") || strings.HasPrefix(key, "label:") {
				t.Errorf("mode=min tells %s", key)
			}
		}
	})

	t.Run("two platforms", func(t *testing.T) {
		entry, archive := toBuffer("oci", nil)
		response, err := te.buildAttested("FROM scratch\nARG TARGETARCH\nCOPY top /$TARGETARCH\n", map[string]string{"platform": "linux/amd64,linux/arm64", "attest:provenance": "mode=max"}, entry)
		if err != nil {
			t.Fatal(err)
		}
		a := readAttested(t, response["containerimage.digest"], fromArchive(t, archive.Bytes()))
		if len(a.manifests) != 2 || len(a.about) != 2 {
			t.Fatalf("%d manifests, %d attestation manifests", len(a.manifests), len(a.about))
		}
		for i, arch := range []string{"amd64", "arm64"} {
			var p types.ProvenancePredicateSLSA1
			decode(t, a.statements[i][0].Predicate, &p)
			if got := p.BuildDefinition.InternalParameters.TargetPlatform; got != "linux/"+arch {
				t.Errorf("platform %s, want %s", got, arch)
			}
		}
		// Clients read what was told from the record of the build.
		rec := te.history(&controlapi.BuildHistoryRequest{})[0]
		if len(rec.Results) != 2 || len(rec.Results["linux/arm64"].GetAttestations()) != 1 {
			t.Fatalf("record %v", rec)
		}
		d := rec.Results["linux/arm64"].Attestations[0]
		var p types.ProvenancePredicateSLSA1
		decode(t, te.blob(d), &p)
		if d.Annotations["in-toto.io/predicate-type"] != "https://slsa.dev/provenance/v1" || p.BuildDefinition.InternalParameters.BuildConfig == nil {
			t.Errorf("attachment %v: %+v", d, p.BuildDefinition)
		}
	})

	t.Run("not asked for", func(t *testing.T) {
		// The digest is that of the first build, and provenance that is only for images changes nothing in an archive.
		entry, _ := toBuffer("oci", nil)
		plain, err := te.buildAttested(dockerfile, attrs("none"), entry)
		if err != nil {
			t.Fatal(err)
		}
		for _, provenance := range []string{"mode=min,inline-only=true", "disabled=true"} {
			entry, archive := toBuffer("oci", nil)
			response, err := te.buildAttested(dockerfile, attrs(provenance), entry)
			if err != nil {
				t.Fatal(err)
			}
			if response["containerimage.digest"] != plain["containerimage.digest"] || strings.Contains(archive.String(), "attestation-manifest") {
				t.Errorf("%s: %v, want %v", provenance, response, plain)
			}
		}
		entry, archive := toBuffer("docker", nil)
		response, err := te.buildAttested(dockerfile, attrs("mode=max"), entry)
		if err != nil || response["containerimage.digest"] != plain["containerimage.digest"] || strings.Contains(archive.String(), "attestation-manifest") {
			t.Errorf("docker: %v, %v", response, err)
		}
		// It is kept beside the record of the build all the same.
		rec := te.history(&controlapi.BuildHistoryRequest{})[0]
		i := slices.IndexFunc(rec.Result.Attestations, func(d *controlapi.Descriptor) bool { return d.MediaType == "application/vnd.in-toto+json" })
		if i < 0 || !strings.Contains(string(te.blob(rec.Result.Attestations[i])), `"llbDefinition"`) {
			t.Errorf("record %v", rec.Result)
		}
	})

	t.Run("attestation-inline", func(t *testing.T) {
		const inline = "mode=min,inline-only=true"
		if _, a, _ := export(t, inline, map[string]string{"attestation-inline": "true"}); len(a.about) != 1 {
			t.Errorf("an archive that is to have it: %d attestation manifests", len(a.about))
		}
		response, err := te.buildAttested(dockerfile, attrs(inline), bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": "x", "attestation-inline": "false"}})
		if err != nil || response["containerimage.config.digest"] == "" {
			t.Errorf("an image that is not to have it: %v, %v", response, err)
		}
	})

	t.Run("files", func(t *testing.T) {
		const dockerfile = "FROM scratch\nCOPY top /a\nCOPY top /d/b\n"
		attrs := map[string]string{"attest:provenance": "mode=min,filename=where.json"}
		dir := t.TempDir()
		if _, err := te.buildAttested(dockerfile, attrs, bkclient.ExportEntry{Type: "local", OutputDir: dir, Attrs: map[string]string{"attestation-prefix": "app."}}); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(filepath.Join(dir, "app.where.json"))
		if err != nil {
			t.Fatal(err)
		}
		var s statement
		decode(t, raw, &s)
		want := digest.FromString("top").Encoded()
		if len(s.Subject) != 2 || s.Subject[0].Name != "a" || s.Subject[1].Name != "d/b" || s.Subject[1].Digest["sha256"] != want {
			t.Errorf("subjects %v", s.Subject)
		}
		entry, archive := toBuffer("tar", nil)
		if _, err := te.buildAttested(dockerfile, map[string]string{"attest:provenance": "mode=min"}, entry); err != nil {
			t.Fatal(err)
		}
		if files := untar(t, archive.Bytes()); len(files["provenance.json"]) == 0 {
			t.Errorf("tar: %v", files)
		}
		merged := t.TempDir()
		attrs = map[string]string{"attest:provenance": "mode=min", "platform": "linux/amd64,linux/arm64"}
		if _, err := te.buildAttested("FROM scratch\nARG TARGETARCH\nCOPY top /$TARGETARCH\n", attrs, bkclient.ExportEntry{Type: "local", OutputDir: merged, Attrs: map[string]string{"platform-split": "false"}}); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"provenance.linux_amd64.json", "provenance.linux_arm64.json"} {
			if _, err := os.Stat(filepath.Join(merged, name)); err != nil {
				t.Error(err)
			}
		}
		_, err = te.buildAttested("FROM scratch\nCOPY top /provenance.json\n", map[string]string{"attest:provenance": ""}, bkclient.ExportEntry{Type: "local", OutputDir: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), "set attestation-prefix") {
			t.Errorf("a file of that name: %v", err)
		}
	})

	t.Run("refused", func(t *testing.T) {
		entry, _ := toBuffer("oci", map[string]string{"oci-mediatypes": "false"})
		if _, err := te.buildAttested(dockerfile, attrs("mode=max"), entry); err == nil || !strings.Contains(err.Error(), "oci-mediatypes=false") {
			t.Errorf("Docker's media types: %v", err)
		}
		if _, err := te.buildAttested(dockerfile, attrs("complete-materials=true")); err == nil || !strings.Contains(err.Error(), "local source context") {
			t.Errorf("complete materials: %v", err)
		}
	})
}

func readBody(t *testing.T, res *http.Response) []byte {
	t.Helper()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func infoRequest(d digest.Digest) *contentapi.InfoRequest {
	return &contentapi.InfoRequest{Digest: d.String()}
}

// post calls the Docker API.
func (te *testEngine) post(t *testing.T, path string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", te.socket)
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://slipway"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Registry-Auth", "e30=")
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body := readBody(t, res); res.StatusCode/100 != 2 || strings.Contains(string(body), `"error"`) {
		t.Fatalf("POST %s: %s: %s", path, res.Status, body)
	}
}

// TestPushAttested: what docker buildx asks for when nobody asks for anything is pushed, found by skopeo, pulled into another store and run
// from there.
func TestPushAttested(t *testing.T) {
	te := openTest(t)
	te.base()
	registry := registrytest.Start(t, registrytest.Options{})
	name := registry.Host + "/team/app:1"
	response, err := te.buildAttested("FROM base\nCOPY top /\nCMD cat /top\n", map[string]string{"attest:provenance": "mode=min,inline-only=true"},
		bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": name, "push": "true"}})
	if err != nil {
		t.Fatal(err)
	}
	read := func(kind string) func(d digest.Digest) []byte {
		return func(d digest.Digest) []byte {
			for _, kind := range []string{kind, "manifests", "blobs"} {
				req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+registry.Host+"/v2/team/app/"+kind+"/"+d.String(), nil)
				for _, mt := range []string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest} {
					req.Header.Add("Accept", mt)
				}
				res, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				if res.StatusCode == http.StatusOK {
					return readBody(t, res)
				}
			}
			t.Fatalf("%s is not in the registry", d)
			return nil
		}
	}
	a := readAttested(t, response["containerimage.digest"], read("manifests"))
	if len(a.manifests) != 1 || len(a.about) != 1 {
		t.Fatalf("index %+v", a.index)
	}
	for _, l := range a.manifests[0].Layers {
		if !strings.HasSuffix(l.MediaType, "tar+gzip") {
			t.Errorf("layer %v", l)
		}
		read("blobs")(l.Digest)
	}
	raw := run(t, "skopeo", "inspect", "--tls-verify=false", "--raw", "docker://"+name)
	if digest.FromString(raw).String() != response["containerimage.digest"] {
		t.Errorf("skopeo: %s", raw)
	}
	// What is in the local store has the same digest, so a later push is the same image.
	if body := te.get(t, "/images/"+name+"/json"); !strings.Contains(body, response["containerimage.digest"]) {
		t.Errorf("inspect: %s", body)
	}
	rec := te.history(&controlapi.BuildHistoryRequest{})[0]
	if got := rec.Result.Results[0]; got.GetDigest() != response["containerimage.digest"] {
		t.Errorf("record: %v", rec.Result)
	} else {
		readAttested(t, got.Digest, func(d digest.Digest) []byte {
			info, err := te.client.ContentClient().Info(t.Context(), infoRequest(d))
			if err != nil {
				t.Fatalf("%s is not readable for clients: %v", d, err)
			}
			return te.blob(&controlapi.Descriptor{Digest: d.String(), Size: info.Info.Size})
		})
	}

	// Garbage collection leaves what a later push needs.
	te.prune(bkclient.PruneAll)
	second := registrytest.Start(t, registrytest.Options{})
	te.post(t, "/images/"+name+"/tag?repo="+second.Host+"/team/app&tag=1")
	te.post(t, "/images/"+second.Host+"/team/app/push?tag=1")
	if raw := run(t, "skopeo", "inspect", "--tls-verify=false", "--raw", "docker://"+second.Host+"/team/app:1"); digest.FromString(raw).String() != response["containerimage.digest"] {
		t.Errorf("after a prune: %s", raw)
	}

	other := openAt(t, t.TempDir())
	out := other.mustBuild(request{name: "child", files: map[string]string{"Dockerfile": "FROM " + name + "\nRUN cat /top && echo again > /x\n"}})
	if !strings.Contains(out.logs, "top") {
		t.Errorf("built on what was pulled: %s", out.logs)
	}
	body := other.get(t, "/images/child/json")
	if !strings.Contains(body, `"Architecture":"amd64"`) {
		t.Errorf("inspect: %s", body)
	}
}

// scannerDockerfile is a scanner of SBOMs by BuildKit's protocol: it lists files.
const scannerDockerfile = `FROM base
COPY <<-"EOF" /scan
	set -e
	scan() { # DIR NAME
		{
			printf '{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://spdx.dev/Document","subject":[{"name":"x","digest":{"sha1":"abc"}}],'
			printf '"predicate":{"spdxVersion":"SPDX-2.3","name":"%s","creationInfo":{"creators":["Tool: tiny"]},"note":"%s","files":[' "$2" "$BUILDKIT_SCAN_NOTE"
			comma=
			for f in $(cd "$1" && find . -type f -maxdepth 1 | sort); do
				printf '%s{"SPDXID":"SPDXRef-File","fileName":"%s"}' "$comma" "${f#./}"
				comma=,
			done
			printf ']}}'
		} > "$BUILDKIT_SCAN_DESTINATION/$2.spdx.json"
	}
	test -d /tmp
	for dir in "$BUILDKIT_SCAN_SOURCE" ${BUILDKIT_SCAN_SOURCE_EXTRAS:+"$BUILDKIT_SCAN_SOURCE_EXTRAS"/*}; do
		scan "$dir" "$(basename "$dir")"
	done
EOF
ENTRYPOINT ["/bin/sh", "/scan"]
`

type spdx struct {
	Name         string
	Note         string
	CreationInfo struct{ Creators []string }
	Files        []struct{ FileName, Comment string }
}

func TestSBOM(t *testing.T) {
	te := openTest(t)
	te.base()
	registry := registrytest.Start(t, registrytest.Options{})
	scanner := registry.Host + "/scanner:1"
	if _, err := te.buildAttested(scannerDockerfile, nil, bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": scanner, "push": "true", "store": "false"}}); err != nil {
		t.Fatal(err)
	}
	const dockerfile = "ARG BUILDKIT_SBOM_SCAN_CONTEXT=true\nFROM base AS tools\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nRUN echo tool > /tool\nFROM scratch\nCOPY --from=tools /tool /\nCOPY top /two\n"
	check := func(t *testing.T, a attested, documents ...string) {
		t.Helper()
		var got []string
		for _, s := range a.statements[0] {
			if s.PredicateType != "https://spdx.dev/Document" {
				continue
			}
			var doc spdx
			decode(t, s.Predicate, &doc)
			got = append(got, doc.Name)
			if doc.Note != "hey" {
				t.Errorf("parameters do not reach the scanner: %q", doc.Note)
			}
			if len(s.Subject) != 1 || s.Subject[0].Name != "x" || s.Subject[0].Digest["sha1"] != "abc" {
				t.Errorf("subjects %v", s.Subject)
			}
			for i, f := range doc.Files {
				want := ""
				if doc.Name == "sbom" {
					want = "layerID: " + a.manifests[0].Layers[i].Digest.String() // tool is in the first, two in the second
				}
				if f.Comment != want {
					t.Errorf("%s: file %s has comment %q, want %q", doc.Name, f.FileName, f.Comment, want)
				}
			}
			if doc.Name == "sbom" && (len(doc.Files) != 2 || len(doc.CreationInfo.Creators) != 2) {
				t.Errorf("document %+v", doc)
			}
		}
		if !slices.Equal(got, documents) {
			t.Errorf("documents %v, want %v", got, documents)
		}
	}
	t.Run("by the frontend", func(t *testing.T) {
		entry, archive := toBuffer("oci", nil)
		response, err := te.buildAttested(dockerfile, map[string]string{"attest:sbom": "generator=" + scanner + ",NOTE=hey", "attest:provenance": "mode=max"}, entry)
		if err != nil {
			t.Fatal(err)
		}
		a := readAttested(t, response["containerimage.digest"], fromArchive(t, archive.Bytes()))
		check(t, a, "sbom", "sbom-context", "sbom-tools")
		if len(a.statements[0]) != 4 || a.statements[0][3].PredicateType != "https://slsa.dev/provenance/v1" {
			t.Errorf("%d statements", len(a.statements[0]))
		}
		if !strings.Contains(string(a.statements[0][3].Predicate), "pkg:docker/"+registry.Host+"/scanner@1") {
			t.Errorf("the scanner is no material: %s", a.statements[0][3].Predicate)
		}
	})
	t.Run("through the gateway, into files", func(t *testing.T) {
		files := t.TempDir()
		if err := os.WriteFile(filepath.Join(files, "Dockerfile"), []byte("FROM scratch\nCOPY Dockerfile /x\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		local, _ := fsutil.NewFS(files)
		dir := t.TempDir()
		opt := bkclient.SolveOpt{
			FrontendAttrs: map[string]string{"attest:sbom": "generator=" + scanner}, LocalMounts: map[string]fsutil.FS{"context": local, "dockerfile": local},
			Exports: []bkclient.ExportEntry{{Type: "local", OutputDir: dir}},
		}
		_, err := te.client.Build(t.Context(), opt, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			return c.Solve(ctx, gwclient.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: opt.FrontendAttrs})
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(filepath.Join(dir, "sbom.spdx.json"))
		if err != nil || !strings.Contains(string(raw), `"fileName": "x"`) {
			t.Errorf("%s, %v", raw, err)
		}
	})
	t.Run("of a plain definition", func(t *testing.T) {
		def, err := llb.Scratch().File(llb.Mkfile("/tool", 0o644, []byte("x"))).File(llb.Mkfile("/two", 0o644, nil)).Marshal(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		entry, archive := toBuffer("oci", nil)
		response, err := te.client.Solve(t.Context(), def, bkclient.SolveOpt{
			FrontendAttrs: map[string]string{"attest:sbom": "generator=" + scanner + ",NOTE=hey"}, Exports: []bkclient.ExportEntry{entry},
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		check(t, readAttested(t, response.ExporterResponse["containerimage.digest"], fromArchive(t, archive.Bytes())), "sbom")
	})
	t.Run("no scanner", func(t *testing.T) {
		_, err := te.buildAttested("FROM scratch\nCOPY top /\n", map[string]string{"attest:sbom": "generator=" + registry.Host + "/nosuch"})
		if err == nil || !strings.Contains(err.Error(), "generator=IMAGE") || !strings.Contains(err.Error(), "nosuch") {
			t.Errorf("got %v", err)
		}
	})
}

// TestProvenanceOfInputs: a result that is given to another frontend is told of by the request that made it, and one that a frontend only
// passes on does not lead in a circle.
func TestProvenanceOfInputs(t *testing.T) {
	te := openTest(t)
	build := func(second string) types.Parameters {
		t.Helper()
		local := func(dockerfile string) fsutil.FS {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "Dockerfile"), []byte(dockerfile))
			files, err := fsutil.NewFS(dir)
			if err != nil {
				t.Fatal(err)
			}
			return files
		}
		first := local("FROM scratch\nCOPY Dockerfile /first\n")
		opt := bkclient.SolveOpt{LocalMounts: map[string]fsutil.FS{"context": first, "dockerfile": first, "context2": local(second), "dockerfile2": local(second)}}
		_, err := te.client.Build(t.Context(), opt, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			made, err := c.Solve(ctx, gwclient.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: map[string]string{"build-arg:WHICH": "first"}})
			if err != nil {
				return nil, err
			}
			st, err := made.Ref.ToState()
			if err != nil {
				return nil, err
			}
			def, err := st.Marshal(ctx)
			if err != nil {
				return nil, err
			}
			return c.Solve(ctx, gwclient.SolveRequest{
				Frontend: "dockerfile.v0", FrontendInputs: map[string]*pb.Definition{"base": def.ToPB()},
				FrontendOpt: map[string]string{"context:base": "input:base", "contextkey": "context2", "dockerfilekey": "dockerfile2", "build-arg:WHICH": "second"},
			})
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range te.history(&controlapi.BuildHistoryRequest{})[0].Result.Attestations {
			if d.MediaType == intoto.PayloadType {
				var p types.ProvenancePredicateSLSA1
				decode(t, te.blob(d), &p)
				return p.BuildDefinition.ExternalParameters.Request
			}
		}
		t.Fatal("no provenance")
		return types.Parameters{}
	}
	for _, second := range []string{"FROM base\nCOPY Dockerfile /second\n", "FROM base\n"} {
		r := build(second)
		in := r.Inputs["base"]
		if r.Args["build-arg:WHICH"] != "second" || len(r.Inputs) != 1 || in.Request.Args["build-arg:WHICH"] != "first" || len(in.Request.Inputs) != 0 {
			t.Errorf("%q: %+v, inputs %+v", second, r, in)
		}
	}
}

// TestFrontendAttestations: what frontends say themselves, and what they may not.
func TestFrontendAttestations(t *testing.T) {
	te := openTest(t)
	solve := func(att bkresult.Attestation[gwclient.Reference], files llb.State) (attested, error) {
		entry, archive := toBuffer("oci", nil)
		response, err := te.client.Build(t.Context(), bkclient.SolveOpt{Exports: []bkclient.ExportEntry{entry}}, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
			ref := func(st llb.State) (gwclient.Reference, error) {
				def, err := st.Marshal(ctx)
				if err != nil {
					return nil, err
				}
				res, err := c.Solve(ctx, gwclient.SolveRequest{Definition: def.ToPB()})
				if err != nil {
					return nil, err
				}
				return res.SingleRef()
			}
			out := gwclient.NewResult()
			root, err := ref(llb.Scratch().File(llb.Mkfile("/f", 0o644, nil)))
			if err != nil {
				return nil, err
			}
			out.SetRef(root)
			if att.Ref, err = ref(files); err != nil {
				return nil, err
			}
			out.AddAttestation("linux/amd64", att)
			return out, nil
		}, nil)
		if err != nil {
			return attested{}, err
		}
		return readAttested(t, response.ExporterResponse["containerimage.digest"], fromArchive(t, archive.Bytes())), nil
	}
	one := llb.Scratch().File(llb.Mkfile("/p.json", 0o644, []byte(`{"k":[1]}`))).File(llb.Mkfile("/dir", 0o644, nil))
	a, err := solve(bkresult.Attestation[gwclient.Reference]{
		Kind: gwpb.AttestationKind_InToto, Path: "/p.json",
		InToto: bkresult.InTotoAttestation{PredicateType: "https://example.test/p", Subjects: []bkresult.InTotoSubject{{
			Kind: gwpb.InTotoSubjectKind_Raw, Name: "n", Digest: []digest.Digest{digest.FromString("n")},
		}}},
	}, one)
	if err != nil {
		t.Fatal(err)
	}
	s := a.statements[0][0]
	if string(s.Predicate) != `{"k":[1]}` || s.PredicateType != "https://example.test/p" || len(s.Subject) != 1 || s.Subject[0].Name != "n" {
		t.Errorf("statement %+v", s)
	}
	bundle := llb.Scratch().File(llb.Mkdir("/b", 0o755)).
		File(llb.Mkfile("/b/1", 0o644, []byte(`{"_type":"x","predicateType":"t1","subject":[],"predicate":{"a":1}}`))).
		File(llb.Mkfile("/b/2", 0o644, []byte(`{"_type":"x","predicateType":"t2","subject":[],"predicate":{"a":2}}`)))
	if a, err = solve(bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_Bundle, Path: "/b"}, bundle); err != nil {
		t.Fatal(err)
	}
	if len(a.statements[0]) != 2 || a.statements[0][1].PredicateType != "t2" || string(a.statements[0][1].Predicate) != `{"a":2}` {
		t.Errorf("statements %+v", a.statements)
	}

	lies := llb.Scratch().File(llb.Mkfile("/b", 0o644, []byte(`{"predicateType":"https://slsa.dev/provenance/v1","predicate":{}}`)))
	for _, tc := range []struct {
		name  string
		att   bkresult.Attestation[gwclient.Reference]
		files llb.State
		want  string
	}{
		{"provenance", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_InToto, Path: "/p.json", InToto: bkresult.InTotoAttestation{PredicateType: "https://slsa.dev/provenance/v0.2"}}, one, "may not say"},
		{"bundled provenance", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_Bundle}, lies, "may not say"},
		{"other type", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_Bundle, Path: "/b", InToto: bkresult.InTotoAttestation{PredicateType: "t1"}}, bundle, "predicate type t2, not t1"},
		{"no JSON", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_Bundle}, one, "not an in-toto statement"},
		{"no file", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_InToto, Path: "/none"}, one, "/none is not there"},
		{"no path", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_InToto}, one, "no path"},
		{"no digest", bkresult.Attestation[gwclient.Reference]{Kind: gwpb.AttestationKind_InToto, Path: "/p.json", InToto: bkresult.InTotoAttestation{Subjects: []bkresult.InTotoSubject{{
			Kind: gwpb.InTotoSubjectKind_Raw, Digest: []digest.Digest{"nonsense"},
		}}}}, one, "not a digest"},
	} {
		if _, err := solve(tc.att, tc.files); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

// TestHistoryOfConfig: each line of the image's history has the layer that its instruction has made, also when all steps are found.
func TestHistoryOfConfig(t *testing.T) {
	te := openTest(t)
	te.base()
	// The second RUN changes nothing; without the steps the first of the two would be taken for that one as well.
	const dockerfile = "FROM base\nRUN true\nRUN echo a > /a\nWORKDIR /w\nCOPY --link top /l\n"
	for _, round := range []string{"made", "found"} {
		entry, archive := toBuffer("oci", nil)
		response := te.mustExport(dockerfile, nil, entry)
		read := fromArchive(t, archive.Bytes())
		var m ocispec.Manifest
		decode(t, read(digest.Digest(response["containerimage.digest"])), &m)
		var config ocispec.Image
		decode(t, read(m.Config.Digest), &config)
		empty := map[string]bool{}
		for _, h := range config.History {
			for _, part := range []string{"RUN /bin/sh -c true", "RUN /bin/sh -c echo a", "WORKDIR", "COPY top /l"} {
				if strings.Contains(h.CreatedBy, part) {
					empty[part] = h.EmptyLayer
				}
			}
		}
		if len(empty) != 4 || !empty["RUN /bin/sh -c true"] || empty["RUN /bin/sh -c echo a"] || empty["WORKDIR"] || empty["COPY top /l"] {
			t.Errorf("%s: lines without a layer: %v", round, empty)
		}
	}
}
