// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/seed-68981b69/slipway/cache/fsys"
)

// childEnv names the directory in which a copy of the test binary puts records until it is killed.
const childEnv = "SLIPWAY_RECORD_KILL_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		putUntilKilled(dir)
	}
	goleak.VerifyTestMain(m)
}

// putUntilKilled puts record and value number i and then says so on standard output, for every i from the first free one on.
func putUntilKilled(dir string) {
	s, err := Open(dir)
	if err == nil {
		first := 0
		for ok := true; ok && err == nil; {
			if _, ok, err = s.Get(context.Background(), fmt.Sprint("k", first)); ok {
				first++
			}
		}
		for i := first; err == nil; i++ {
			rec := sample()
			rec.PeakMemory = int64(i)
			rec.Durable = i%16 == 0
			if i%16 == 0 {
				err = s.PutValue("n", strconv.Itoa(i), []byte(strconv.Itoa(i)))
			}
			if err == nil {
				err = s.Put(context.Background(), rec, fmt.Sprint("c", i), fmt.Sprint("k", i))
			}
			fmt.Println(i)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// What was acknowledged before kill -9 is there afterwards, through several lives of one database.
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "records")
	last := -1
	for life, more := range []int{1, 700, 40, 2500} {
		child := exec.Command(exe)
		child.Env = append(os.Environ(), childEnv+"="+dir)
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		stop := last + more
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if last, err = strconv.Atoi(lines.Text()); err != nil {
				t.Fatal(err)
			}
			if last == stop {
				child.Process.Kill() // it goes on writing until the signal arrives
			}
		}
		child.Wait()
		if last < stop {
			t.Fatalf("life %d: the child ended after record %d", life, last)
		}

		s := open(t, dir)
		for i := range last + 1 {
			for _, key := range []string{fmt.Sprint("k", i), fmt.Sprint("c", i)} {
				if rec := mustGet(t, s, key, true); rec.PeakMemory != int64(i) || rec.Durable != (i%16 == 0) {
					t.Fatalf("life %d: record %s is not what was put: %+v", life, key, rec)
				}
			}
			if i%16 == 0 {
				if v, ok, err := s.GetValue("n", strconv.Itoa(i)); err != nil || !ok || string(v) != strconv.Itoa(i) {
					t.Fatalf("life %d: value %d = %q, %v, %v", life, i, v, ok, err)
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		t.Logf("life %d: killed after record %d; all there", life, last)
	}
}

// A process that dies while Badger makes a file leaves it empty, or without its header.
func TestHalfMadeFiles(t *testing.T) {
	for _, name := range []string{"00001.mem", "00002.mem", "000099.vlog", "000099.sst", "DISCARD", "MANIFEST-REWRITE", "KEYREGISTRY-REWRITE"} {
		for _, size := range []int64{0, 4096, 16 << 20} {
			t.Run(fmt.Sprint(name, "/", size), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "records")
				s := open(t, dir)
				rec := sample()
				rec.Durable = true
				if err := s.Put(t.Context(), rec, "k"); err != nil {
					t.Fatal(err)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, size); err != nil {
					t.Fatal(err)
				}
				for range 2 {
					s = open(t, dir)
					mustGet(t, s, "k", true)
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if aside, _ := filepath.Glob(dir + ".broken-*"); len(aside) > 0 {
					t.Errorf("put aside: %v", aside)
				}
			})
		}
	}
}

// A database that cannot be opened is put aside, not fatal.
func TestBrokenDatabaseIsPutAside(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "records")
	s := open(t, dir)
	if err := s.Put(t.Context(), sample(), "k"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if err := os.WriteFile(filepath.Join(dir, "MANIFEST"), []byte("this is no manifest"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	mustGet(t, s, "k", false)
	if err := s.Put(t.Context(), sample(), "k"); err != nil {
		t.Fatal(err)
	}
	if aside, err := filepath.Glob(dir + ".broken-*/MANIFEST"); err != nil || len(aside) != 1 {
		t.Errorf("put aside: %v, %v", aside, err)
	}
}

// Trouble that is not the database's leaves it where it is.
func TestUnreadable(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{errors.New("manifest has bad magic"), true},
		{fmt.Errorf("file does not exist for table 7"), true},
		{ErrInUse, false},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, false},
		{fmt.Errorf("Opening memtables error: %v", syscall.EMFILE), false}, // as Badger puts it
		{room(fsys.OS, t.TempDir(), 1<<62), false},
	} {
		if got := unreadable(c.err); got != c.want {
			t.Errorf("unreadable(%v) = %v", c.err, got)
		}
	}
}
