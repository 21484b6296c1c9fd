// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A Node project that needs no network: its base image is this machine's node with npm and busybox, its packages are directories beside the source. Its build
// reads every module, has the engine parse it, and compresses it for the web server (Brotli, as bundlers do for static files); what has been compressed is kept by content.

const (
	nodeModules = 40
	nodeFile    = `FROM base AS dependencies
WORKDIR /app
COPY package.json package-lock.json ./
COPY vendor vendor
RUN --mount=type=cache,target=/root/.npm npm ci --install-links --offline --no-audit --no-fund --loglevel=error
FROM base AS build
WORKDIR /app
COPY --from=dependencies /app/node_modules ./node_modules
COPY . .
RUN --mount=type=cache,target=/app/.cache node build.js
FROM scratch
COPY --from=build /app/dist /dist
`
	nodeBuild = `const fs = require('fs'), zlib = require('zlib'), vm = require('vm'), crypto = require('crypto');
const name = require('small-0');
fs.mkdirSync('dist', { recursive: true });
for (const f of fs.readdirSync('src')) {
  const text = fs.readFileSync('src/' + f);
  const kept = '.cache/' + crypto.createHash('sha256').update(text).digest('hex');
  if (!fs.existsSync(kept)) {
    new vm.Script(text.toString(), { filename: f });
    const out = zlib.brotliCompressSync(text, { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 11 } });
    fs.writeFileSync(kept + '.tmp', out);
    fs.renameSync(kept + '.tmp', kept);
  }
  fs.copyFileSync(kept, 'dist/' + name(f) + '.br');
}
`
	nodeBaseFile = "FROM scratch\nCOPY . /\nENV PATH=/usr/bin:/bin HOME=/root\n"
)

var remoteNode = &scenario{
	name: "remote-cache-node",
	about: "A Node project on an empty store after a change in one line: npm ci of local packages is found in the cache of a registry on loopback (mode=max), the build " +
		"(40 modules, parsed and compressed) runs. With slipway what it keeps in a cache mount has come along, with BuildKit it is empty. The goal is half of BuildKit's time.",
	floorAbout: "the build alone, with what it keeps",
	goal:       2,
	goals:      []goal{numberWithin(secondExport, "% of the first", 5)},
	prepare:    func(ctx context.Context, b *bench) error { return b.prepareNode(ctx) },
	round:      func(b *bench, n int) error { return b.changeNode(n) },
	floor: func(ctx context.Context, b *bench) error {
		cmd := exec.CommandContext(ctx, "node", "build.js")
		cmd.Dir = filepath.Join(b.dir, "alone")
		if err := runQuietly(ctx, exec.CommandContext(ctx, "cp", "-a", filepath.Join(b.dir, "context", "src"), cmd.Dir)); err != nil {
			return err
		}
		return runQuietly(ctx, cmd)
	},
	contestant: func(ctx context.Context, b *bench, p peer) (*contestant, error) {
		one := build{dir: filepath.Join(b.dir, "context"), base: filepath.Join(b.dir, "layout")}
		return remoteCaching(ctx, b, p, remote{one: one, change: func() error { return b.changeNode(1000) }})
	},
}

// prepareNode makes the project and its base image. A machine without node cannot.
func (b *bench) prepareNode(ctx context.Context) error {
	node, err := exec.LookPath("node")
	if err != nil {
		return &cannotError{"its base image is made of this machine's node, and there is none"}
	}
	npm, err := exec.LookPath("npm")
	if err == nil {
		npm, err = filepath.EvalSymlinks(npm)
	}
	if err != nil || !strings.HasSuffix(npm, "/npm/bin/npm-cli.js") {
		return &cannotError{"its base image is made of this machine's npm, and there is none"}
	}
	dir := filepath.Join(b.dir, "context")
	files := map[string]string{"Dockerfile": nodeFile, "build.js": nodeBuild, ".dockerignore": "Dockerfile\nnode_modules\n"}
	var dependencies []string
	for i := range 12 {
		name := fmt.Sprintf("small-%d", i)
		files["vendor/"+name+"/package.json"] = fmt.Sprintf(`{"name":%q,"version":"1.0.0","main":"index.js"}`, name)
		files["vendor/"+name+"/index.js"] = "module.exports = (s) => s;\n"
		dependencies = append(dependencies, fmt.Sprintf(`%q:"file:vendor/%s"`, name, name))
	}
	files["package.json"] = `{"name":"app","version":"1.0.0","private":true,"dependencies":{` + strings.Join(dependencies, ",") + "}}\n"
	source := rand.New(b.random("node"))
	for i := range nodeModules {
		files[fmt.Sprintf("src/module%d.js", i)] = nodeModule(source, i)
	}
	if err := b.writeInput(dir, files); err != nil {
		return err
	}
	lock := exec.CommandContext(ctx, "npm", "install", "--install-links", "--package-lock-only", "--offline", "--no-audit", "--no-fund")
	lock.Dir = dir
	lock.Env = append(os.Environ(), "HOME="+b.dir)
	if err := runQuietly(ctx, lock); err != nil {
		return &cannotError{fmt.Sprintf("npm cannot lock local packages: %v", err)}
	}
	if err := b.nodeBase(ctx, node, npm); err != nil {
		return err
	}
	alone := filepath.Join(b.dir, "alone")
	return errors.Join(b.writeInput(alone, map[string]string{
		"build.js": nodeBuild, ".cache/.keep": "", "node_modules/small-0/index.js": "module.exports = (s) => s;\n",
	}))
}

// nodeModule is a module of about 30 kB that looks like one.
func nodeModule(source *rand.Rand, i int) string {
	words := []string{"request", "response", "session", "user", "order", "total", "index", "value", "items", "config", "handler", "result"}
	var w strings.Builder
	fmt.Fprintf(&w, "'use strict';\nconst version = 0;\nmodule.exports.name = 'module%d';\n", i)
	for n := range 330 {
		a, b := words[source.IntN(len(words))], words[source.IntN(len(words))]
		fmt.Fprintf(&w, "module.exports.%s%s%d = function (%s, %s) { return %s + %d * %s.length; };\n", a, b, n, a, b+"2", a, source.IntN(1_000_000), b+"2")
	}
	return w.String()
}

// changeNode changes one line of one module.
func (b *bench) changeNode(n int) error {
	path := filepath.Join(b.dir, "context", "src", "module7.js")
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	lines := strings.Split(string(text), "\n")
	lines[1] = fmt.Sprintf("const version = %d;", n+2)
	return os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o644)
}

// nodeBase makes the base image, an OCI layout: node with the libraries that it is linked with, npm, and busybox as sh and env.
func (b *bench) nodeBase(ctx context.Context, node, npm string) error {
	dir := filepath.Join(b.dir, "base")
	if err := b.writeInput(dir, map[string]string{"bin/busybox": "", "usr/bin/.keep": "", "root/.keep": "", "tmp/.keep": "", "Dockerfile": nodeBaseFile, ".dockerignore": "Dockerfile\n.dockerignore\n"}); err != nil {
		return err
	}
	for link, to := range map[string]string{
		"bin/sh": "busybox", "usr/bin/env": "/bin/busybox", "usr/bin/npm": "/usr/lib/node_modules/npm/bin/npm-cli.js",
	} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			return err
		}
	}
	program, err := filepath.EvalSymlinks(node)
	if err != nil {
		return err
	}
	if err := copyFile(program, filepath.Join(dir, "usr/bin/node"), 0o755); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "ldd", program).Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) { // a static program has none, and ldd says so with its exit status
		return &cannotError{fmt.Sprintf("the libraries of node cannot be found: %v", err)}
	}
	for _, field := range strings.Fields(string(out)) {
		if !strings.HasPrefix(field, "/") {
			continue
		}
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(field)), 0o755); err != nil {
			return err
		}
		if err := copyFile(field, filepath.Join(dir, field), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	modules := filepath.Join(dir, "usr/lib/node_modules")
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return err
	}
	if err := runQuietly(ctx, exec.CommandContext(ctx, "cp", "-a", filepath.Dir(filepath.Dir(npm)), modules)); err != nil {
		return fmt.Errorf("copy npm: %w", err)
	}
	s := b.peers[0].(*slipway)
	o, err := s.open(ctx, b.stateDir("base"), 0)
	if err != nil {
		return err
	}
	err = runQuietly(ctx, o.build(build{dir: dir, output: "type=oci,tar=false,compression=zstd,name=base,dest=" + filepath.Join(b.dir, "layout")}))
	return errors.Join(err, o.close())
}
