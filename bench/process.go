// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what processes have used since they began.
type usage struct {
	cpu     time.Duration
	written int64
}

// tick is the unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture.
const tick = time.Second / 100

// stat is one line of /proc/PID/stat.
type stat struct {
	parent int
	cpu    time.Duration // with that of children that have been waited for
}

// processes reads all processes.
func processes() map[int]stat {
	all := map[int]stat{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil {
			continue // has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			continue
		}
		if s, ok := parseStat(line); ok {
			all[pid] = s
		}
	}
	return all
}

// parseStat reads a line of /proc/PID/stat. The second field, the name, may have spaces and parentheses in it.
func parseStat(line []byte) (stat, bool) {
	i := bytes.LastIndexByte(line, ')')
	if i < 0 {
		return stat{}, false
	}
	fields := strings.Fields(string(line[i+1:])) // fields[0] is the third of the line
	if len(fields) < 15 {
		return stat{}, false
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return stat{}, false
	}
	var ticks int64
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return stat{}, false
		}
		ticks += n
	}
	return stat{parent, time.Duration(ticks) * tick}, true
}

// tree adds to roots all their descendants.
func tree(all map[int]stat, roots []int) []int {
	in := map[int]bool{}
	for _, p := range roots {
		in[p] = true
	}
	for more := true; more; {
		more = false
		for pid, s := range all {
			if !in[pid] && in[s.parent] {
				in[pid], more = true, true
			}
		}
	}
	var pids []int
	for pid := range in {
		pids = append(pids, pid)
	}
	return pids
}

// usageOf sums what processes and their descendants have used; processes that have ended are in what their parents
// waited for.
func usageOf(roots []int) usage {
	var u usage
	if len(roots) == 0 {
		return u
	}
	all := processes()
	for _, pid := range tree(all, roots) {
		u.cpu += all[pid].cpu
		u.written += written(strconv.Itoa(pid))
	}
	return u
}

// adopt makes this process the parent of what programs that were ended leave behind, as buildah leaves containers.
func adopt() error { return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }

// endOrphans kills what was adopted, when nobody has a program running.
func endOrphans() {
	for found := true; found; {
		found = false
		for pid, s := range processes() {
			if s.parent == os.Getpid() {
				found = true // its children come next
				_ = syscall.Kill(pid, syscall.SIGKILL)
				_, _ = syscall.Wait4(pid, nil, 0, nil)
			}
		}
	}
}

// written is what a process and the children that it has waited for have sent to disks.
func written(pid string) int64 {
	data, err := os.ReadFile("/proc/" + pid + "/io")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

// ownUsage is that of this process and its children.
func ownUsage() usage {
	u := usage{written: written("self")}
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var r syscall.Rusage
		if syscall.Getrusage(who, &r) == nil {
			u.cpu += time.Duration(r.Utime.Nano() + r.Stime.Nano())
		}
	}
	return u
}

// watchMemory looks at the memory of processes and their descendants in intervals until stop, which returns the most there
// was, in bytes.
func watchMemory(interval time.Duration, roots func() []int) (stop func() int64) {
	end, done := make(chan struct{}), make(chan int64)
	go func() {
		var peak int64
		for {
			var sum int64
			for _, pid := range tree(processes(), roots()) {
				sum += proportional(pid)
			}
			peak = max(peak, sum)
			select {
			case <-end:
				done <- peak
				return
			case <-time.After(interval):
			}
		}
	}()
	return func() int64 {
		close(end)
		return <-done
	}
}

// proportional is the memory of a process in bytes; pages that are shared by n processes count 1/n.
func proportional(pid int) int64 {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "Pss:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}

func loadAverage() string {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Fields(string(data))[0]
}
