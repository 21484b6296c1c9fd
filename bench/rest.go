// SPDX-License-Identifier: Apache-2.0

package main

// whereTimeGoes says for each scenario where the time goes that slipway takes, and what it would take to remove it. It was read from
// profiles (-profile cpu; shares are of the engine's samples) of 2026-11-24; look again when something has changed.
var whereTimeGoes = map[string]string{
	"noop-small": `more than half of the client's time passes before main, in the initialisation of 420 packages (BuildKit's client, gRPC, protobuf, and the engine's own, which are in the same program).
The engine needs about 4 ms until the client has its answer (builder.Build, gateway.Client.Solve); what is most of its samples, keepHistory (37 %), comes after that: it writes the build's record, log and provenance (blob.Store.PutBytes).
A client program without the engine was tried: 27 to 20 ms of processor time, for a second program to install.`,
	"noop-50k": `96 % is source/local's worker, which stats each file (Fstatat 68 %, Getdents 11 %, sorting names 6 %). Less would mean to trust a watch for changes.`,
	"context-cold": `each file is read and hashed by source/local, then read again by layer.batches and written to the layer's tar, which is hashed as a whole (layer.newSink).
The second read could go if the context went straight into a tar; the second hash only if diff IDs were made later.`,
	"context-one-change": `the COPY's layer has all files, so its tar is written anew: tarBuf.readFile 21 %, write 15 %, SHA-256 of the tar 10 %, stats of the context 11 %. explain.compareFiles (19 %) comes after the client has its answer.
Less needs layers that share what they have in common (reflinks; ext4 has none).`,
	"chain-60": `of a step's processor time the engine has less than half: Runc.Start 25 %, mount points 14 %, the removal of upper directories 11 %, overlay mounts 9 % of its samples. The rest is libcontainer's way through three processes, its directories
in a dozen cgroup hierarchies, and the first process's Go runtime. Starting without libcontainer saved 6 ms a step and was not wanted (docs/adr/0005).`,
	"chain-60-cached":     `as in noop-small: the client's start, then one look-up for the last step, which is found.`,
	"fanout-8":            `above the ideal are the start and end of the containers on two processors, the first COPY (an fsync), and the export after the last step.`,
	"wide-8":              `as in chain-60, on both processors.`,
	"copy-from-1GB":       `reading, hashing (SHA-256) and writing 1 GB once: the new layer's tar. Less needs reflinks.`,
	"concurrent-2":        `as in noop-small, for each client: their starts share the processors.`,
	"concurrent-8":        `as in noop-small, for each client: their starts share the processors.`,
	"export-plain":        `the kernel's copy of the layer's tar to the archive. With 1 GB on a disk that writes 0.3 GB a second the disk decides (1.1 × the floor), for BuildKit as well; with 400 MB, which the page cache takes, it is 6.4 × faster than BuildKit.`,
	"export-gzip":         `the compressor (kgzip's blocks on all processors), more than nine tenths.`,
	"export-zstd":         `zstd.Encoder.EncodeAll 87 %. BuildKit has the same encoder in one stream of two overlapping threads; more processors widen the gap.`,
	"export-again":        `the kernel's copy of the compressed blob to the archive.`,
	"push-1GB":            `the bytes of the compressed layer on their way, and the registry's writes. This side has the kernel send them (sendfile), and does not look at them.`,
	"push-pipelined":      `the last step. What follows it is the config, the manifest and the tag.`,
	"pull-10x80MB-gzip":   `decompression, and SHA-256 of what came and of what it unpacks to; the tar is written as it comes.`,
	"pull-10x80MB-zstd":   `SHA-256 of what came and of what it unpacks to, and the write of the tar; decompression is the smaller part.`,
	"go-cold":             `the compiler.`,
	"go-change":           `the compiler, which finds no cache.`,
	"go-mounts":           `the compiler, for what has changed, and the linker.`,
	"remote-cache":        `the client's start, code that a new daemon runs for the first time, and seven requests to the registry. What is left to sync before the answer are manifests and the image's name: a few milliseconds.`,
	"remote-cache-change": `the compiler and the linker, after the cache mounts have been restored from the registry.`,
	"remote-cache-node":   `the compile step, after the cache mounts have been restored from the registry.`,
	"small-files": `after the command its upper directory is walked: each file is looked at, read and hashed for the layer's index, so that what is built on it can be found by content. Hashing could wait for the first step that asks; the walk is
what the export needs anyway.`,
	"apt-install":  `apt and dpkg. The volatile overlay makes their fsyncs free, which a plain overlay pays.`,
	"run-bridge":   `as in run-true, a network namespace with its cable from the pool, and the rules for the port (nftables).`,
	"run-true":     `the client (25 of about 45 ms of processor time: package initialisation, then five requests), the container as in chain-60.`,
	"cli-start":    `package initialisation (420 packages), then the flags of one command.`,
	"daemon-start": `the first build's client, opening Badger, and trying out what can be mounted (EROFS, overlay) and networked here.`,
	"idle":         `about half is the program's own text, a quarter Badger's mapped files; the heap is given back to the kernel.`,
	"du":           `record.Store.Walk 71 %: Badger's values (Item.Value) and their decoding (CBOR 28 %). A summary beside each record would save most.`,
	"prune":        `as in du, and the deletion of layers.`,
}
