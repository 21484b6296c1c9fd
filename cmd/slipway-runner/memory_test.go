// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"os"
	"path/filepath"
	"testing"
)

const mb = 1 << 20

// TestMemoryWatch: page cache does not count, tmpfs does, and memory that was given back before the end was needed.
func TestMemoryWatch(t *testing.T) {
	const (
		v1 = "cache 0\nrss 5\ntotal_cache 314572800\ntotal_rss 104857600\ntotal_shmem 10485760\ntotal_swap 0\n"
		v2 = "anon 104857600\nfile 314572800\nshmem 10485760\nslab_reclaimable 20971520\n"
	)
	for _, c := range []struct {
		name, stat string
		earlier    int64 // sampled while it ran
		peak, want int64
	}{
		{"v1", v1, 0, 410 * mb, 120 * mb}, // 410 less 290 of page cache
		{"v2", v2, 0, 410 * mb, 110 * mb}, // what is there now: 410 less 310 is less
		{"given back", v1, 300 * mb, 410 * mb, 300 * mb},
		{"never more than the kernel's peak", v1, 300 * mb, 200 * mb, 200 * mb},
		{"small", v1, 0, 60 * mb, 60 * mb},
		{"no file", "", 0, 410 * mb, 410 * mb},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if c.stat != "" {
				if err := os.WriteFile(filepath.Join(dir, "memory.stat"), []byte(c.stat), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, paths := range []map[string]string{{"memory": dir, "cpu": "/nowhere"}, {"": dir}} {
				w := watchMemory(paths)
				w.needed = c.earlier
				if got := w.end(c.peak); got != c.want {
					t.Errorf("%v: got %d MB, want %d", paths, got/mb, c.want/mb)
				}
			}
		})
	}
}

func TestDiskBytes(t *testing.T) {
	for text, want := range map[string][2]int64{
		"": {},
		"8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2 rios=1 wios=1\n":            {11, 22},
		"8:0 Read 10\n8:0 Write 20\n8:0 Sync 5\n8:0 Total 30\n8:16 Read 1\n8:16 Write 2\n8:16 Total 3\nTotal 33\n": {11, 22},
		"8:0 Read\nnonsense\n": {},
	} {
		if read, written := diskBytes(text); [2]int64{read, written} != want {
			t.Errorf("diskBytes(%q) = %d, %d; want %v", text, read, written, want)
		}
	}
}
