// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/sha1"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// metadata asks the engine, as a frontend in the client's process does.
func (te *testEngine) metadata(source string, attrs map[string]string, opt sourceresolver.Opt) (md *sourceresolver.MetaResponse, err error) {
	te.t.Helper()
	_, err = te.client.Build(te.t.Context(), bkclient.SolveOpt{}, "test", func(ctx context.Context, c gwclient.Client) (*gwclient.Result, error) {
		if md, err = c.ResolveSourceMetadata(ctx, &pb.SourceOp{Identifier: source, Attrs: attrs}, opt); err != nil {
			return nil, err
		}
		return gwclient.NewResult(), nil
	}, nil)
	return md, err
}

// TestGitObjects asks for the objects of commits and tags, by which their signatures are checked.
func TestGitObjects(t *testing.T) {
	repo := serveGit(t)
	te := openTest(t)
	repo.write("file", "one")
	repo.commit()
	repo.git("tag", "-a", "v1", "-m", "first")
	repo.write("file", "two")
	repo.commit()
	objectID := func(kind string, object []byte) string {
		return fmt.Sprintf("%x", sha1.Sum(append(fmt.Appendf(nil, "%s %d\x00", kind, len(object)), object...)))
	}
	tag, tagged, head := repo.git("rev-parse", "v1"), repo.git("rev-parse", "v1^{commit}"), repo.git("rev-parse", "HEAD")
	objects := sourceresolver.Opt{GitOpt: &sourceresolver.ResolveGitOpt{ReturnObject: true}}
	for _, tc := range []struct{ ref, tag, commit string }{
		{"main", "", head}, {"v1", tag, tagged}, {head, "", head}, {tag, tag, tagged},
	} {
		attrs := map[string]string{pb.AttrFullRemoteURL: repo.url}
		md, err := te.metadata("git://"+strings.TrimPrefix(repo.url, "http://")+"#"+tc.ref, attrs, objects)
		if err != nil {
			t.Errorf("%s: %v", tc.ref, err)
			continue
		}
		if got := objectID("commit", md.Git.CommitObject); got != tc.commit {
			t.Errorf("%s: commit object %s, want %s", tc.ref, got, tc.commit)
		}
		if tc.tag == "" {
			if md.Git.TagObject != nil || md.Git.CommitChecksum != "" || md.Git.Checksum != tc.commit {
				t.Errorf("%s: %+v", tc.ref, md.Git)
			}
		} else if got := objectID("tag", md.Git.TagObject); got != tc.tag || md.Git.CommitChecksum != tc.commit || md.Git.Checksum != tc.tag {
			t.Errorf("%s: tag object %s, want %s; %+v", tc.ref, got, tc.tag, md.Git)
		}
	}
}

// TestFileChecksum asks for the digest of a file with something behind it, which is what a signature is of.
func TestFileChecksum(t *testing.T) {
	te := openTest(t)
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "text") }))
	t.Cleanup(files.Close)
	ask := func(algo sourceresolver.ResolveHTTPChecksumAlgo, suffix string) (*sourceresolver.ResolveHTTPChecksumResponse, error) {
		md, err := te.metadata(files.URL+"/f", nil, sourceresolver.Opt{HTTPOpt: &sourceresolver.ResolveHTTPOpt{
			ChecksumReq: &sourceresolver.ResolveHTTPChecksumRequest{Algo: algo, Suffix: []byte(suffix)},
		}})
		if err != nil {
			return nil, err
		}
		return md.HTTP.ChecksumResponse, nil
	}
	for algo, algorithm := range map[sourceresolver.ResolveHTTPChecksumAlgo]digest.Algorithm{
		sourceresolver.ResolveHTTPChecksumAlgoSHA256: digest.SHA256, sourceresolver.ResolveHTTPChecksumAlgoSHA384: digest.SHA384,
		sourceresolver.ResolveHTTPChecksumAlgoSHA512: digest.SHA512,
	} {
		got, err := ask(algo, "and more")
		if err != nil {
			t.Fatal(err)
		}
		if want := algorithm.FromString("textand more"); got.Digest != want.String() || string(got.Suffix) != "and more" {
			t.Errorf("%+v, want %s", got, want)
		}
	}
	if _, err := ask(0, strings.Repeat("x", 5000)); err == nil || !strings.Contains(err.Error(), "5000 bytes") {
		t.Errorf("long suffix: %v", err)
	}
}

// TestImageAttestations asks for what is said about an image in a registry: the chain from its index to statements and signature.
func TestImageAttestations(t *testing.T) {
	te := openTest(t)
	te.base()
	reg := registrytest.Start(t, registrytest.Options{})
	name := reg.Host + "/team/signed:1"
	resp, err := te.buildAttested("FROM base\nRUN true\n", map[string]string{"attest:provenance": "mode=max"},
		bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": name, "push": "true", "store": "false"}})
	if err != nil {
		t.Fatal(err)
	}
	const provenance = "https://slsa.dev/provenance/v1"
	ask := func(name string, opt sourceresolver.ResolveImageOpt) *sourceresolver.ResolveImageResponse {
		t.Helper()
		md, err := te.metadata("docker-image://"+name, nil, sourceresolver.Opt{ImageOpt: &opt})
		if err != nil {
			t.Fatal(err)
		}
		return md.Image
	}
	if img := ask(name, sourceresolver.ResolveImageOpt{}); img.AttestationChain != nil {
		t.Errorf("a chain that nobody asked for: %+v", img.AttestationChain)
	}
	img := ask(name, sourceresolver.ResolveImageOpt{AttestationChain: true})
	chain := img.AttestationChain
	if chain == nil || chain.Root != img.Digest || chain.Root.String() != resp["containerimage.digest"] || chain.ImageManifest == "" || chain.AttestationManifest == "" || len(chain.SignatureManifests) != 0 || len(chain.Blobs) != 2 {
		t.Fatalf("chain %+v of %s", chain, img.Digest)
	}
	for d, b := range chain.Blobs {
		if digest.FromBytes(b.Data) != d || b.Descriptor.Digest != d {
			t.Errorf("blob %s has other bytes", d)
		}
	}

	// A signature is what refers to the attestation manifest, in the registry.
	bundle := []byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`)
	put := func(path, mediaType string, data []byte) {
		t.Helper()
		req, err := http.NewRequest(http.MethodPut, path, strings.NewReader(string(data)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", mediaType)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusCreated {
			t.Fatalf("PUT %s: %s", path, res.Status)
		}
	}
	repository := "http://" + reg.Host + "/v2/team/signed"
	blob := func(data []byte) {
		t.Helper()
		res, err := http.Post(repository+"/blobs/uploads/", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		put(res.Header.Get("Location")+"&digest="+digest.FromBytes(data).String(), "application/octet-stream", data)
	}
	blob(bundle)
	blob([]byte("{}"))
	subject := chain.Blobs[chain.AttestationManifest].Descriptor
	signature, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: "application/vnd.dev.sigstore.bundle.v0.3+json",
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{{MediaType: "application/vnd.dev.sigstore.bundle.v0.3+json", Digest: digest.FromBytes(bundle), Size: int64(len(bundle))}},
		Subject:      &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	})
	if err != nil {
		t.Fatal(err)
	}
	signed := digest.FromBytes(signature)
	put(repository+"/manifests/"+signed.String(), ocispec.MediaTypeImageManifest, signature)
	// Registries without the referrers API have a tag for them.
	referrers, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageManifest, Digest: signed, Size: int64(len(signature)), ArtifactType: "application/vnd.dev.sigstore.bundle.v0.3+json"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	put(repository+"/manifests/"+strings.Replace(subject.Digest.String(), ":", "-", 1), ocispec.MediaTypeImageIndex, referrers)

	chain = ask(name, sourceresolver.ResolveImageOpt{ResolveAttestations: []string{provenance}}).AttestationChain
	if len(chain.SignatureManifests) != 1 || chain.SignatureManifests[0] != signed || string(chain.Blobs[digest.FromBytes(bundle)].Data) != string(bundle) {
		t.Errorf("signatures %v", chain.SignatureManifests)
	}
	statements := 0
	for _, b := range chain.Blobs {
		if b.Descriptor.Annotations["in-toto.io/predicate-type"] == provenance {
			statements++
			if !strings.Contains(string(b.Data), `"buildDefinition"`) {
				t.Errorf("statement %s", b.Data)
			}
		}
	}
	if statements != 1 {
		t.Errorf("%d statements", statements)
	}

	// An image without an index has no documents, and one that was only built here no signature.
	if img := ask("base", sourceresolver.ResolveImageOpt{AttestationChain: true}); img.AttestationChain == nil || img.AttestationChain.Root != img.Digest || len(img.AttestationChain.Blobs) != 0 {
		t.Errorf("chain of a single manifest: %+v", img.AttestationChain)
	}
	const local = "unreachable.test/team/local:1"
	if _, err := te.buildAttested("FROM base\nRUN true\n", map[string]string{"attest:provenance": ""}, bkclient.ExportEntry{Type: "image", Attrs: map[string]string{"name": local}}); err != nil {
		t.Fatal(err)
	}
	if chain := ask(local, sourceresolver.ResolveImageOpt{AttestationChain: true}).AttestationChain; chain == nil || chain.AttestationManifest == "" || len(chain.SignatureManifests) != 0 {
		t.Errorf("chain of a local image: %+v", chain)
	}
}
