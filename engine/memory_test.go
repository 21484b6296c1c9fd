// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMachineMemory(t *testing.T) {
	const gib = 1 << 30
	meminfo := "MemTotal:        8388608 kB\nMemFree:         1000 kB\n"
	for _, c := range []struct {
		name  string
		files map[string]string
		want  int64 // 0: an error
	}{
		{"no cgroup", map[string]string{"proc/meminfo": meminfo}, 8 * gib},
		{"v2", map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/a/b\n",
			"sys/fs/cgroup/a/memory.max": "2147483648\n", "sys/fs/cgroup/a/b/memory.max": "max\n",
		}, 2 * gib},
		{"v2 in a container", map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/docker/x\n", "sys/fs/cgroup/memory.max": "1073741824\n",
		}, gib},
		{"v1", map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "5:cpu,memory:/c\n1:cpuset:/c\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n", "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "4294967296\n",
		}, 4 * gib},
		{"a limit above the machine", map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "99999999999999\n",
		}, 8 * gib},
		{"nothing", nil, 0},
		{"damaged", map[string]string{"proc/meminfo": "MemTotal: much\n"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range c.files {
				path := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := machineMemory(root)
			if got != c.want || (err == nil) != (c.want > 0) {
				t.Errorf("got %d (%v), want %d", got, err, c.want)
			}
		})
	}
	here, err := MachineMemory()
	if err != nil || here < 64<<20 {
		t.Errorf("here: %d, %v", here, err)
	}
	if got := (Options{}).maxMemory(); got != here/5*4 {
		t.Errorf("default %d of %d", got, here)
	}
	if got := (Options{MaxMemory: 7}).maxMemory(); got != 7 {
		t.Errorf("got %d", got)
	}
}
