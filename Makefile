# Slipway: `make` lists what there is to do.

GO        ?= go
BIN       := bin/slipway
RUNNER    := executor/runc/runner/slipway-runner
TMP       := $(CURDIR)/.tmp
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BENCHSTAT := golang.org/x/perf/cmd/benchstat@latest
BENCH_OUT ?= $(TMP)/bench
SCENARIOS ?= noop-small,noop-50k,chain-60,fanout-8,run-true
# The packages whose benchmarks are of hot paths: keys, records, look-ups in indexes, pack, unpack, mounts, contexts, namespaces, containers.
MICRO     := ./solver ./cache/record ./cache/index ./cache/layer ./cache/snapshot ./solver/source/local ./executor/network ./executor/runc
GOFUMPT   := mvdan.cc/gofumpt@v0.12.0
GOTESTSUM := gotest.tools/gotestsum@v1.13.0
# go-test runs the tests of the packages $(1) with the flags $(2). With RERUN=n (CI has 2) what fails is run again alone, at most n
# times: a test that only a loaded machine makes fail is told, with what it printed, and one that is broken fails still.
go-test = $(if $(RERUN),$(GO) run $(GOTESTSUM) --format standard-quiet --rerun-fails=$(RERUN) --rerun-fails-max-failures=5 --packages="$(1)" -- $(2),$(GO) test $(2) $(1))

# What the build needs, what the tests need besides, and what the demo needs besides, from Debian.
BUILD_PACKAGES := libseccomp-dev pkg-config gcc libc6-dev ca-certificates
TEST_PACKAGES  := busybox-static skopeo umoci buildah mmdebstrap nftables iproute2 uidmap
BENCH_PACKAGES := busybox-static buildah runc e2fsprogs mount
DEMO_PACKAGES  := busybox-static mmdebstrap curl

.DEFAULT_GOAL := help
.PHONY: help build runner deps-build deps-test deps-demo deps-bench test race script realworld fuzz torture bench bench-curves bench-compare bench-store lint golden demo check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# apt-install installs what is missing of its arguments and says so; nothing when all is there.
define apt-install
	@missing=; for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then echo "make: these Debian packages are needed, install them as root: $$missing" >&2; exit 1; fi; \
		echo "make: installing$$missing"; \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$missing; } >$${TMPDIR:-/tmp}/slipway-apt.log 2>&1 \
			|| { tail -20 $${TMPDIR:-/tmp}/slipway-apt.log >&2; exit 1; }; \
	fi
endef

deps-build:
	$(call apt-install,$(BUILD_PACKAGES))

deps-test: deps-build
	$(call apt-install,$(TEST_PACKAGES))

deps-bench: deps-build
	$(call apt-install,$(BENCH_PACKAGES))

deps-demo: deps-build
	$(call apt-install,$(DEMO_PACKAGES))

runner: deps-build
	CGO_ENABLED=1 $(GO) build -trimpath -tags "netgo osusergo seccomp" -ldflags "-s -w -linkmode external -extldflags -static" -o $(RUNNER) ./cmd/slipway-runner

# Copied, because what the linker has written through memory is in the page cache in small pieces, and its start takes 10 % more
# processor time until the cache forgets it. What is installed is a copy, too.
build: runner ## build bin/slipway, installing the few packages that needs
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X github.com/seed-68981b69/slipway/engine.Version=$(VERSION)" -o $(BIN).linked ./cmd/slipway
	@cp $(BIN).linked $(BIN).new && mv $(BIN).new $(BIN) && rm $(BIN).linked

test: deps-test runner ## run all tests, installing what they need (as root: with containers and mounts)
	@[ "$$(id -u)" = 0 ] || echo "make: NOT ROOT: everything that needs containers, mounts or namespaces will be SKIPPED" >&2
	$(call go-test,./...,-timeout 30m)

race: deps-test runner ## run the tests of solver, cache and executor under the race detector
	$(call go-test,$$($(GO) list ./solver/... ./cache/... ./executor/... | grep -v '/cache/share/\(chunk\|s3\)$$'),-timeout 30m -race)

script: deps-test runner ## run the end-to-end scripts only
	$(GO) test -count=1 -run 'TestScript' ./cmd/slipway

realworld: deps-test runner ## build the Dockerfiles in testdata/realworld only (apt, npm, Go modules)
	$(GO) test -timeout 30m -count=1 -v -run 'TestRealWorld' ./cmd/slipway

fuzz: ## run each fuzz target for 20 seconds
	@for pkg in $$($(GO) list ./...); do for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
		echo "$$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime 20s $$pkg || exit 1; done; done

lint: deps-build ## go vet, staticcheck, gofumpt
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	@out=$$($(GO) run $(GOFUMPT) -l .); [ -z "$$out" ] || { echo "gofumpt would change:"; echo "$$out"; exit 1; }

torture: build deps-test ## kill slipway and store workers at random points, and check what is left (5 minutes)
	@mkdir -p $(TMP) && dir=$$(mktemp -d $(TMP)/torture.XXXXXX) && \
	SLIPWAY_TEST_STEPS=1000 $(GO) test ./executor/runc -run TestNothingIsLeftByMany -count=1 && \
	$(GO) run ./cache/cachetest/torture -runs 200 -builds 60 -slipway $(BIN) -root $$dir; status=$$?; rm -rf $$dir; exit $$status

bench: build deps-bench ## measure slipway beside BuildKit, buildah and runc (root, 30 GB of disk, 31 minutes); writes .tmp/bench/RESULTS.md
	@mkdir -p $(TMP) && $(GO) run ./bench -build-peers -dir $(TMP) -plant 10ms -out $(BENCH_OUT)

bench-curves: build deps-bench ## draw time and memory against size: files, steps, layers, stages, records (6 minutes); writes .tmp/bench/CURVES.md
	@mkdir -p $(TMP) && $(GO) run ./bench -scenario none -curve all -peers none -dir $(TMP) -out $(BENCH_OUT)

bench-compare: build deps-bench ## measure this tree beside another commit: make bench-compare REF=v1 [SCENARIOS=a,b]; writes .tmp/bench-compare
	@[ -n "$(REF)" ] || { echo "make: which commit? make bench-compare REF=…" >&2; exit 1; }
	@mkdir -p $(TMP)/bench-compare && git worktree add --force --detach $(TMP)/bench-ref $(REF) && \
	{ $(MAKE) -C $(TMP)/bench-ref build && \
	  $(GO) run ./bench -peers none -against $(TMP)/bench-ref/bin/slipway -scenario $(SCENARIOS) -dir $(TMP) -out $(TMP)/bench-compare && \
	  (cd $(TMP)/bench-ref && $(GO) test -run '^$$' -bench . -benchmem -count 6 $(MICRO)) >$(TMP)/bench-compare/old.txt; \
	  $(GO) test -run '^$$' -bench . -benchmem -count 6 $(MICRO) >$(TMP)/bench-compare/new.txt; \
	  $(GO) run $(BENCHSTAT) $(TMP)/bench-compare/old.txt $(TMP)/bench-compare/new.txt | tee $(TMP)/bench-compare/benchstat.txt; }; \
	status=$$?; git worktree remove --force $(TMP)/bench-ref; exit $$status

bench-store: runner ## measure the store beside its floors (root, 8 GB of disk, 4 minutes); prints a table
	@mkdir -p $(TMP) && dir=$$(mktemp -d $(TMP)/bench.XXXXXX) && \
	$(GO) run ./bench/store -dir $$dir; status=$$?; rm -rf $$dir; exit $$status

golden: ## rewrite golden files from what the code does now; review the diff
	$(GO) test ./executor/runc -run Golden -update

demo: build deps-demo ## build, push and run a small web service, and print its page with the times
	@SLIPWAY=$(CURDIR)/$(BIN) sh testdata/demo/demo.sh

check: lint test race ## what CI runs

clean: ## remove what was built
	rm -rf bin .tmp $(RUNNER)
