// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"

	"github.com/seed-68981b69/slipway/cache"
)

func (te *testEngine) usage(opts ...bkclient.DiskUsageOption) []*bkclient.UsageInfo {
	te.t.Helper()
	list, err := te.client.DiskUsage(te.t.Context(), opts...)
	if err != nil {
		te.t.Fatal(err)
	}
	return list
}

func (te *testEngine) prune(opts ...bkclient.PruneOption) (deleted []bkclient.UsageInfo) {
	te.t.Helper()
	ch := make(chan bkclient.UsageInfo)
	var collected sync.WaitGroup
	collected.Go(func() {
		for u := range ch {
			deleted = append(deleted, u)
		}
	})
	err := te.client.Prune(te.t.Context(), ch, opts...)
	close(ch)
	collected.Wait()
	if err != nil {
		te.t.Fatal(err)
	}
	return deleted
}

func find(list []*bkclient.UsageInfo, description string) *bkclient.UsageInfo {
	i := slices.IndexFunc(list, func(u *bkclient.UsageInfo) bool { return strings.Contains(u.Description, description) })
	if i < 0 {
		return nil
	}
	return list[i]
}

func table(list []*bkclient.UsageInfo) string {
	var b strings.Builder
	for _, u := range list {
		fmt.Fprintf(&b, "%-32s %-16s in use %-5v shared %-5v mutable %-5v %10d  %s\n", u.ID, u.RecordType, u.InUse, u.Shared, u.Mutable, u.Size, u.Description)
	}
	return b.String()
}

func TestDiskUsageAndPrune(t *testing.T) {
	te := openTest(t)
	te.base()
	app := func(name string) request {
		return request{name: name, files: map[string]string{
			"file": strings.Repeat("x", 1<<20),
			"Dockerfile": `FROM base AS one
RUN head -c 60000000 /dev/urandom > /big
FROM one
RUN --mount=type=cache,target=/c head -c 9000000 /dev/urandom > /c/x && echo hello
COPY file /
`,
		}}
	}
	te.mustBuild(app(""))

	list := te.usage()
	var sum int64
	for _, u := range list {
		sum += u.Size
	}
	onDisk, err := cache.DirUsage(t.Context(), te.root)
	if err != nil {
		t.Fatal(err)
	}
	if diff := float64(sum-onDisk) / float64(onDisk); diff > 0.1 || diff < -0.1 {
		t.Errorf("the sizes add up to %d, on disk are %d\n%s", sum, onDisk, table(list))
	}
	big := find(list, "head -c 60000000")
	if big == nil || big.Size < 60e6 || big.Size > 70e6 || big.InUse || big.Shared || big.Mutable ||
		big.RecordType != bkclient.UsageRecordTypeRegular || big.LastUsedAt == nil || time.Since(big.CreatedAt) > time.Hour || len(big.Parents) == 0 {
		t.Fatalf("the step with 60 MB: %+v\n%s", big, table(list))
	}
	if !strings.HasPrefix(big.Description, "[one 2/2] RUN") {
		t.Errorf("it is called %q", big.Description)
	}
	if parents := te.usage(bkclient.WithFilter([]string{"id==" + big.Parents[0]})); len(parents) != 1 {
		t.Errorf("its parent is not there:\n%s", table(list))
	}
	mounts := te.usage(bkclient.WithFilter([]string{"type==exec.cachemount"}))
	if len(mounts) != 1 || !mounts[0].Mutable || mounts[0].Size < 9e6 || !strings.Contains(mounts[0].Description, "/c") {
		t.Errorf("cache mounts:\n%s", table(mounts))
	}
	if old := te.usage(bkclient.WithAgeLimit(time.Hour)); slices.ContainsFunc(old, func(u *bkclient.UsageInfo) bool { return u.LastUsedAt != nil }) {
		t.Errorf("used an hour ago:\n%s", table(old))
	}
	if _, err := te.client.DiskUsage(t.Context(), bkclient.WithFilter([]string{"type=="})); err == nil {
		t.Error("a filter that makes no sense is taken")
	}

	if deleted := te.prune(bkclient.PruneAll, bkclient.WithKeepOpt(time.Hour, 0, 0, 0)); len(deleted) != 0 {
		t.Errorf("deleted although used in the last hour: %+v", deleted)
	}
	if deleted := te.prune(bkclient.WithKeepOpt(0, 0, 1<<40, 0)); len(deleted) != 0 {
		t.Errorf("deleted below the cap: %+v", deleted)
	}
	if deleted := te.prune(bkclient.WithFilter([]string{"type==exec.cachemount"})); len(deleted) != 1 || deleted[0].Size < 9e6 {
		t.Errorf("cache mounts deleted: %+v", deleted)
	}
	if cached, ran := te.mustBuild(app("")).steps(); len(ran) != 0 && len(cached) == 0 {
		t.Errorf("after that, cached %q, ran %q", cached, ran)
	}

	var freed int64
	for _, u := range te.prune(bkclient.PruneAll) {
		freed += u.Size
	}
	if freed < 61e6 {
		t.Errorf("%d bytes freed", freed)
	}
	for _, u := range te.usage() {
		if !u.InUse {
			t.Errorf("left: %+v", u)
		}
	}
	if after, err := cache.DirUsage(t.Context(), te.root); err != nil || after > onDisk-61e6 {
		t.Errorf("%d bytes on disk before, %d after (%v)", onDisk, after, err)
	}

	// The base is an image and still there; what was pruned is made anew.
	_, ran := te.mustBuild(app("app")).steps()
	if !slices.ContainsFunc(ran, func(s string) bool { return strings.Contains(s, "head -c 60000000") }) {
		t.Errorf("ran %q after everything was pruned", ran)
	}
	// Now an image has the layers.
	list = te.usage()
	if big := find(list, "head -c 60000000"); big == nil || !big.Shared {
		t.Errorf("in an image: %+v", big)
	}
	if deleted := te.prune(); slices.ContainsFunc(deleted, func(u bkclient.UsageInfo) bool { return u.Shared }) {
		t.Errorf("what an image shares is deleted without being asked: %+v", deleted)
	}
	for _, u := range te.prune(bkclient.PruneAll) {
		if u.Size > 1<<20 {
			t.Errorf("deleted from under an image: %+v", u)
		}
	}
	list = te.usage()
	if image := find(list, "image app"); image == nil || image.Size < 60e6 || !image.InUse {
		t.Errorf("the image's layers:\n%s", table(list))
	}
	te.mustBuild(request{files: map[string]string{"Dockerfile": "FROM app\nRUN test $(wc -c < /big) = 60000000\n"}})
}

// TestAutomaticCollection builds with a cap that the second build exceeds.
func TestAutomaticCollection(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts and containers")
	}
	te := openWith(t, Options{Root: t.TempDir(), GC: GC{Delay: time.Millisecond, Policies: []cache.Policy{{MaxUsedSpace: 25e6}}}})
	te.base()
	step := func(i int) request {
		return request{files: map[string]string{
			"Dockerfile": fmt.Sprintf("FROM base\nRUN head -c 10000000 /dev/urandom > /f && echo %d\n", i),
		}}
	}
	for i := range 3 {
		te.mustBuild(step(i))
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		list := te.usage(bkclient.WithFilter([]string{"description~=head"}))
		if len(list) == 1 && strings.Contains(list[0].Description, "echo 2") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not collected:\n%s", table(te.usage()))
		}
		time.Sleep(50 * time.Millisecond)
	}
	if cached, _ := te.mustBuild(step(2)).steps(); !slices.ContainsFunc(cached, func(s string) bool { return strings.Contains(s, "echo 2") }) {
		t.Errorf("what was used last is gone: cached %q", cached)
	}
}

// TestCollectionInStandaloneEngine ends an engine right after a build, as single commands do.
func TestCollectionInStandaloneEngine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts and containers")
	}
	root := t.TempDir()
	options := Options{Root: root, GC: GC{Delay: time.Hour, Policies: []cache.Policy{{All: true}}}}
	te := openWith(t, options)
	te.mustBuild(request{files: map[string]string{"f": strings.Repeat("x", 4<<20), "Dockerfile": "FROM scratch\nCOPY f /\n"}})
	te.stop()
	if entries, err := filepath.Glob(filepath.Join(root, "layers", "*", "info.json")); err != nil || len(entries) != 0 {
		t.Errorf("layers left: %v, %v", entries, err)
	}
	te = openWith(t, options)
	te.mustBuild(request{files: map[string]string{"f": strings.Repeat("x", 4<<20), "Dockerfile": "FROM scratch\nCOPY f /\n"}})
	te.stop()
	if entries, err := filepath.Glob(filepath.Join(root, "layers", "*", "info.json")); err != nil || len(entries) == 0 {
		t.Errorf("collected again within the hour: %v, %v", entries, err)
	}
}
