#!/bin/sh
# Makes base images in a slipway store from what Debian's package tools and this machine have, since neither a
# registry nor the internet is taken for granted:
#
#   bases.sh STORE_ROOT WORK_DIR NAME...      with NAME of: busybox debian golang node
#
# STORE_ROOT is slipway's --root; WORK_DIR keeps the Debian root file systems between runs. The images get the names
# that real Dockerfiles use (busybox:latest, debian:bookworm, golang:1.26, node:18), in the local store only.
# SLIPWAY names the binary (default: bin/slipway of this repository).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
slipway=${SLIPWAY:-$here/../../bin/slipway}
root=$1
work=$2
shift 2
mkdir -p "$work"

build() { # build NAME CONTEXT [FLAG...], with the Dockerfile on the recipe's side
	name=$1 context=$2 file=$3
	shift 3
	"$slipway" --root "$root" build --progress quiet -t "$name" -f "$here/$file" "$@" "$context" >/dev/null
	echo "made $name"
}

# rootfs DIR INCLUDE: a minimal Debian as DIR/rootfs.tar, with this machine's certificate authorities.
rootfs() {
	[ -f "$1/rootfs.tar" ] && return
	rm -rf "$1.new"
	mkdir -p "$1.new"
	mmdebstrap --quiet --variant=minbase --include="$2" bookworm "$1.new/rootfs.tar"
	# Networks that intercept TLS have their own authority; it is known to the host and must be known inside.
	cp /etc/ssl/certs/ca-certificates.crt "$1.new/"
	rm -rf "$1"
	mv "$1.new" "$1"
}

for name; do
	case $name in
	busybox)
		mkdir -p "$work/busybox"
		cp /bin/busybox "$work/busybox/busybox"
		build busybox:latest "$work/busybox" busybox.Dockerfile
		;;
	debian)
		rootfs "$work/debian" ca-certificates
		build debian:bookworm "$work/debian" debian.Dockerfile
		;;
	golang)
		build golang:1.26 "$(go env GOROOT)" golang.Dockerfile
		;;
	node)
		build node:18 "$work/debian" node.Dockerfile
		;;
	*)
		echo "bases.sh: no recipe for $name: busybox, debian, golang and node are known" >&2
		exit 2
		;;
	esac
done
