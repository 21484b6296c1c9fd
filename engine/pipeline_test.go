// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"

	"github.com/seed-68981b69/slipway/cache/registry/registrytest"
)

// TestPushBeginsBeforeTheBuildEnds: the last step ends when the registry has the layers of all steps before it, and not otherwise.
func TestPushBeginsBeforeTheBuildEnds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts and containers")
	}
	te := openWith(t, Options{Root: t.TempDir(), Entitlements: []string{"network.host"}})
	te.base()
	reg := registrytest.Start(t, registrytest.Options{})
	blobs := func() (there int) {
		for _, put := range reg.Requests("PUT /v2/app/blobs/") {
			u, err := url.Parse(strings.TrimPrefix(put, "PUT "))
			if err != nil {
				t.Error(err)
				continue
			}
			resp, err := http.Head("http://" + reg.Host + "/v2/app/blobs/" + u.Query().Get("digest"))
			if err == nil && resp.StatusCode == http.StatusOK {
				there++
			}
		}
		return there
	}
	var seen int
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for seen = blobs(); seen < 4; seen = blobs() {
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			case <-time.After(time.Minute):
				http.Error(w, "too late", http.StatusInternalServerError)
				return
			}
		}
		fmt.Fprint(w, "there")
	}))
	defer server.Close()
	// base has two layers, and each of these steps makes one.
	dockerfile := "FROM base\nCOPY top /top\nRUN head -c 3000000 /dev/urandom > /big\n" +
		"RUN --network=host test $(wget -q -O - " + server.URL + ") = there && echo > /last\n"
	response, err := te.exportWith(dockerfile, bkclient.SolveOpt{
		AllowedEntitlements: []string{"network.host"},
		Exports:             []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": reg.Host + "/app:1," + reg.Host + "/app:2", "push": "true"}}},
	})
	if err != nil {
		t.Fatalf("%d blobs were in the registry: %v", seen, err)
	}
	if seen != 4 {
		t.Errorf("%d blobs in the registry when the last step ended", seen)
	}
	if tags := reg.Requests("PUT /v2/app/manifests"); len(tags) != 2 {
		t.Errorf("manifests: %v", tags)
	}
	// Nothing was sent twice: five layers and the config.
	puts := map[string]int{}
	for _, put := range reg.Requests("PUT /v2/app/blobs/") {
		u, _ := url.Parse(strings.TrimPrefix(put, "PUT "))
		puts[u.Query().Get("digest")]++
	}
	if len(puts) != 6 {
		t.Errorf("%d blobs were sent", len(puts))
	}
	for d, n := range puts {
		if n > 1 {
			t.Errorf("%s was sent %d times", d, n)
		}
	}
	req, err := http.NewRequest(http.MethodHead, "http://"+reg.Host+"/v2/app/manifests/1", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.Header.Get("Docker-Content-Digest") != response["containerimage.digest"] {
		t.Errorf("the manifest in the registry: %v, %v", resp, err)
	}

	// A build that fails leaves no tag.
	failing := "FROM base\nRUN head -c 100000 /dev/urandom > /other\nRUN false\n"
	if _, err := te.exportWith(failing, bkclient.SolveOpt{
		Exports: []bkclient.ExportEntry{{Type: "image", Attrs: map[string]string{"name": reg.Host + "/failed:1", "push": "true"}}},
	}); err == nil {
		t.Error("RUN false")
	}
	if tags := reg.Requests("PUT /v2/failed/manifests"); len(tags) != 0 {
		t.Errorf("manifests of a build that failed: %v", tags)
	}
}
