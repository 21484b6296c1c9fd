#!/bin/sh
# The demo: make base images, build a small multi-stage web service, push it to a registry on localhost, run it from a
# fresh store, fetch its page. Everything it makes is in one temporary directory and in .tmp of the repository; it
# leaves no process, mount or container behind.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
slipway=${SLIPWAY:-$top/bin/slipway}
if [ "$(id -u)" != 0 ]; then
	echo "demo: needs root (containers and mounts)" >&2
	exit 1
fi

tmp=$(mktemp -d)
registry_pid=
service_pid=
cleanup() {
	status=$?
	trap - EXIT INT TERM
	if [ -n "$service_pid" ]; then kill -TERM "$service_pid" 2>/dev/null || true; wait "$service_pid" 2>/dev/null || true; fi
	for store in builder runner; do
		if [ -d "$tmp/$store" ]; then "$slipway" --root "$tmp/$store" daemon stop >/dev/null 2>&1 || true; fi
	done
	if [ -n "$registry_pid" ]; then kill "$registry_pid" 2>/dev/null || true; wait "$registry_pid" 2>/dev/null || true; fi
	rm -rf "$tmp"
	exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

now() { date +%s.%N; }
times=
timed() { # timed LABEL COMMAND...: runs the command and notes how long it took
	label=$1
	shift
	echo
	echo "== $label"
	begun=$(now)
	"$@"
	times="$times$(printf '%-52s %7.2f s' "$label" "$(echo "$begun $(now)" | awk '{print $2-$1}')")
"
}
await() { # await URL: until it answers, at most 20 seconds
	i=0
	until curl -fsS -o /dev/null "$1" 2>/dev/null; do
		i=$((i + 1))
		[ $i -lt 200 ] || { echo "demo: $1 does not answer" >&2; exit 1; }
		sleep 0.1
	done
}

builder="$slipway --root $tmp/builder"
runner="$slipway --root $tmp/runner"

# A real registry: Debian's docker-registry, unpacked here instead of installed, so that no service is left on the machine.
echo "== registry: unpacking Debian's docker-registry into $tmp"
mkdir -p "$tmp/registry/debs" "$tmp/registry/data"
(cd "$tmp/registry/debs" && apt-get download -q docker-registry >/dev/null 2>"$tmp/apt.log") || {
	apt-get update -q >/dev/null
	(cd "$tmp/registry/debs" && apt-get download -q docker-registry >/dev/null)
}
dpkg -x "$tmp"/registry/debs/docker-registry_*.deb "$tmp/registry"
port=${DEMO_REGISTRY_PORT:-5007}
cat >"$tmp/registry/config.yml" <<CONFIG
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $tmp/registry/data}}
http: {addr: "127.0.0.1:$port"}
CONFIG
"$tmp/registry/usr/bin/docker-registry" serve "$tmp/registry/config.yml" >"$tmp/registry.log" 2>&1 &
registry_pid=$!
await "http://127.0.0.1:$port/v2/"

timed "base images (Debian by mmdebstrap, Go from this machine)" \
	env SLIPWAY="$slipway" sh "$top/testdata/bases/bases.sh" "$tmp/builder" "$top/.tmp/bases" debian golang

cp -r "$here" "$tmp/service"
image=localhost:$port/demo/service:1
timed "build, cold" $builder build --progress plain -t "$image" "$tmp/service"
timed "build, everything cached" $builder build --progress plain -t "$image" "$tmp/service"
sed -i 's/Slipway demo/Slipway demo, edited/' "$tmp/service/main.go"
timed "build, one line of Go changed" $builder build --progress plain -t "$image" "$tmp/service"
timed "push to a registry on localhost" $builder push "$image"
timed "pull into a fresh store" $runner pull "$image"

echo
echo "== run from the fresh store, and fetch the page"
web=${DEMO_PORT:-8087}
begun=$(now)
$runner run --rm --name demo -p "127.0.0.1:$web:8080" "$image" &
service_pid=$!
await "http://127.0.0.1:$web/"
times="$times$(printf '%-52s %7.2f s' "run, until the page is served" "$(echo "$begun $(now)" | awk '{print $2-$1}')")
"
echo
curl -fsS "http://127.0.0.1:$web/"
kill -TERM "$service_pid"
wait "$service_pid" || true
service_pid=

echo
echo "$times"
