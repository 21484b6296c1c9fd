// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The Go service needs no module and no network: its base image, an OCI layout, is the toolchain of this machine and busybox.
const (
	goBase = "FROM scratch\nCOPY . /\nENV PATH=/usr/local/go/bin:/bin HOME=/root CGO_ENABLED=0 GOFLAGS=-trimpath GOTOOLCHAIN=local\n"
	goFile = `FROM base AS source
WORKDIR /src
COPY go.mod ./
COPY . .
FROM source AS build
RUN %sgo build -o /out/service .
FROM scratch
COPY --from=build /out/service /service
ENTRYPOINT ["/service"]
`
	goMount  = "--mount=type=cache,target=/root/.cache/go-build "
	goModule = "module bench.example/service\n\ngo 1.21\n"
	goSource = `package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

const version = %d

func main() {
	if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"version": version, "args": strings.Join(os.Args, " ")}); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}
`
)

var goCold = &scenario{
	name:    "go-cold",
	about:   "A Go service in two stages, on an empty store: the base image (the toolchain, 250 MB) comes from an OCI layout, and the standard library is compiled as well.",
	prepare: func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, "") },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		if _, ok := p.(archiver); !ok {
			return nil, nil
		}
		return coldBuildingOf(func(b *bench) build { return b.goBuild() })(ctx, b, p)
	},
}

var goChange = &scenario{
	name:       "go-change",
	about:      "The same after a change in one line, without a cache mount: everything is compiled again.",
	floorAbout: "the compiler alone, with an empty cache of its own",
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, "") },
	round:      func(b *bench, n int) error { return b.changeGo(n) },
	floor:      func(_ context.Context, b *bench) error { return b.compile("") },
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		if _, ok := p.(archiver); !ok {
			return nil, nil
		}
		source := b.goBuild()
		source.target = "source" // the base is there, and nothing has been compiled
		return buildingPrimed(b.goBuild(), 0, &source)(ctx, b, p)
	},
}

var goMounts = &scenario{
	name:       "go-mounts",
	about:      "The same change with the compiler's cache in a cache mount. The goal is 1.25 × the compiler alone.",
	floorAbout: "the compiler alone, with its cache",
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareGo(ctx, goMount) },
	goals:      []goal{withinFloor(1.25)},
	round:      func(b *bench, n int) error { return b.changeGo(n) },
	floor:      func(_ context.Context, b *bench) error { return b.compile(filepath.Join(b.dir, "gocache")) },
	contestant: goBuilding,
}

func goBuilding(ctx context.Context, b *bench, p peer) (*contestant, error) {
	if _, ok := p.(archiver); !ok {
		return nil, nil
	}
	return rebuilding(b.goBuild())(ctx, b, p)
}

func (b *bench) goBuild() build {
	return build{dir: filepath.Join(b.dir, "context"), tag: "bench", base: b.goLayout}
}

// prepareGo writes the service, and makes the base image once.
func (b *bench) prepareGo(ctx context.Context, mount string) error {
	err := b.writeInput(filepath.Join(b.dir, "context"), map[string]string{
		"Dockerfile": fmt.Sprintf(goFile, mount), "go.mod": goModule, "main.go": fmt.Sprintf(goSource, 0),
	})
	if err != nil || b.goLayout != "" {
		return err
	}
	dir := filepath.Join(b.work, "gobase")
	if err := b.writeInput(dir, map[string]string{"bin/busybox": "", "root/.keep": "", "tmp/.keep": "", "Dockerfile": goBase, ".dockerignore": "Dockerfile\n.dockerignore\n"}); err != nil {
		return err
	}
	for _, link := range []string{"sh", "env"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", link)); err != nil {
			return err
		}
	}
	top := filepath.Join(dir, "usr/local/go")
	if err := os.MkdirAll(top, 0o755); err != nil {
		return err
	}
	root, err := goRoot()
	if err != nil {
		return err
	}
	for _, part := range []string{"bin", "pkg", "src", "VERSION", "go.env"} {
		if err := runQuietly(ctx, exec.Command("cp", "-a", filepath.Join(root, part), top)); err != nil {
			return fmt.Errorf("copy the Go toolchain: %w", err)
		}
	}
	s := b.peers[0].(*slipway)
	o, err := s.open(ctx, b.stateDir("base"), 0)
	if err != nil {
		return err
	}
	layout := filepath.Join(b.work, "golayout")
	err = runQuietly(ctx, o.build(build{dir: dir, output: "type=oci,tar=false,compression=zstd,name=base,dest=" + layout}))
	if err = errors.Join(err, o.close()); err == nil {
		b.goLayout = layout
	}
	return err
}

// goRoot is where the toolchain is that runs the bench.
func goRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find the Go toolchain: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

func (b *bench) changeGo(n int) error {
	return os.WriteFile(filepath.Join(b.dir, "context", "main.go"), fmt.Appendf(nil, goSource, n+2), 0o644)
}

// compile runs the compiler on this machine. Without a cache it gets an empty one.
func (b *bench) compile(cacheDir string) error {
	if cacheDir == "" {
		var err error
		if cacheDir, err = os.MkdirTemp(b.dir, "gocache-"); err != nil {
			return err
		}
		defer b.moveAway(cacheDir)
	}
	cmd := exec.Command(filepath.Join(b.work, "gobase/usr/local/go/bin/go"), "build", "-o", filepath.Join(b.dir, "service"), ".")
	cmd.Dir = filepath.Join(b.dir, "context")
	cmd.Env = []string{
		"PATH=/bin", "HOME=" + b.dir, "CGO_ENABLED=0", "GOFLAGS=-trimpath", "GOTOOLCHAIN=local", "GOCACHE=" + cacheDir,
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile: %w\n%s", err, out)
	}
	return nil
}

// layoutDigest is the digest of the only image of a layout, "" when it cannot be read.
func layoutDigest(dir string) string {
	var index struct {
		Manifests []struct{ Digest string }
	}
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil || json.Unmarshal(raw, &index) != nil || len(index.Manifests) != 1 {
		return ""
	}
	return index.Manifests[0].Digest
}
