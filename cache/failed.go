// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/seed-68981b69/slipway/cache/fsys"
	"github.com/seed-68981b69/slipway/cache/snapshot"
)

const (
	// FailedStepsFor is how long the files of a failed step are kept for whoever wants to look at them.
	FailedStepsFor = 24 * time.Hour
	// MaxFailedSteps is of how many failed steps the files are kept, the newest ones.
	MaxFailedSteps = 8

	failedDir = "failed"
	failedPre = "failed-"
)

// ErrNoFailedStep is wrapped by errors about a failed step whose files are not kept, any more or at all.
var ErrNoFailedStep = errors.New("the files of this failed step are not kept")

// errDamagedStep is wrapped by errors about a failed step whose file says nothing.
var errDamagedStep = errors.New("its file is damaged")

// FailedStep is what a step has left that failed: what one can look at afterwards, never a result. No key leads to it. It is a
// file of its own in the store, not a value of the database, so that it is gone when it is deleted.
type FailedStep struct {
	// ID is made by KeepFailed. It cannot be guessed.
	ID string `json:"id"`
	// Name is the step's for people: "[build 2/3] RUN make".
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	// Op says what the step was, in a form that the store knows nothing of.
	Op []byte `json:"op"`
	// Limits are those of its cgroup, which are no part of Op, in a form that the store knows nothing of either.
	Limits []byte `json:"limits,omitempty"`
	// Inputs are what the mounts of the step had at its beginning, Mounts what they had at its end. An empty snapshot is for a mount
	// that had no files, or has none that are kept.
	Inputs []snapshot.Snapshot `json:"inputs"`
	Mounts []snapshot.Snapshot `json:"mounts"`
}

// Expires is when the files are given up at the latest.
func (f *FailedStep) Expires() time.Time { return f.Created.Add(FailedStepsFor) }

// InputIDs and MountIDs are names for the snapshots of Inputs and Mounts, for FailedResult; "" for those without files.
func (f *FailedStep) InputIDs() []string { return f.ids("input", f.Inputs) }

// MountIDs is like InputIDs.
func (f *FailedStep) MountIDs() []string { return f.ids("mount", f.Mounts) }

func (f *FailedStep) ids(kind string, snaps []snapshot.Snapshot) []string {
	ids := make([]string, len(snaps))
	for i, snap := range snaps {
		if len(snap) > 0 {
			ids[i] = f.ID + "-" + kind + "-" + strconv.Itoa(i)
		}
	}
	return ids
}

// FailedStepOf returns the ID of the failed step that a name made by InputIDs or MountIDs belongs to.
func FailedStepOf(resultID string) (id string, ok bool) {
	id, _, _, ok = splitResultID(resultID)
	return id, ok
}

func splitResultID(resultID string) (id, kind string, i int, ok bool) {
	parts := strings.Split(strings.TrimPrefix(resultID, failedPre), "-")
	if !strings.HasPrefix(resultID, failedPre) || len(parts) != 3 {
		return "", "", 0, false
	}
	i, err := strconv.Atoi(parts[2])
	id = failedPre + parts[0]
	return id, parts[1], i, err == nil && i >= 0 && strconv.Itoa(i) == parts[2] && validFailedID(id)
}

func validFailedID(id string) bool {
	b, err := hex.DecodeString(strings.TrimPrefix(id, failedPre))
	return strings.HasPrefix(id, failedPre) && err == nil && len(b) == 16
}

// KeepFailed keeps what f names for FailedStepsFor, unless a collection needs the room or more steps fail than MaxFailedSteps;
// it fills in f.ID and f.Created. The caller holds a lease.
func (s *Store) KeepFailed(ctx context.Context, f *FailedStep) error {
	for _, snap := range slices.Concat(f.Inputs, f.Mounts) {
		if err := s.Layers.Ensure(ctx, snap...); err != nil {
			return fmt.Errorf("keep the files of a failed step: %w", err)
		}
	}
	var random [16]byte
	rand.Read(random[:])
	f.ID, f.Created = failedPre+hex.EncodeToString(random[:]), s.now()
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("keep the files of a failed step: %w", err)
	}
	if err := os.MkdirAll(s.path(failedDir), 0o700); err != nil {
		return fmt.Errorf("keep the files of a failed step: %w", err)
	}
	// Not synced: what a power cut takes away is missed less than the time for it.
	tmp := s.path(failedDir, f.ID+".tmp")
	if err := fsys.WriteFile(fsys.OS, tmp, data, 0o600, false); err != nil {
		return fmt.Errorf("keep the files of a failed step: %w", err)
	}
	if err := os.Rename(tmp, s.failedPath(f.ID)); err != nil {
		return fmt.Errorf("keep the files of a failed step: %w", err)
	}
	kept, err := s.FailedSteps()
	if err != nil {
		return err
	}
	for _, old := range kept[min(MaxFailedSteps, len(kept)):] {
		if _, err := s.removeFailed(old.ID); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) failedPath(id string) string { return s.path(failedDir, id+".json") }

// FailedSteps lists the failed steps whose files are kept, newest first.
func (s *Store) FailedSteps() ([]*FailedStep, error) {
	all, err := s.failedSteps()
	return slices.DeleteFunc(all, func(f *FailedStep) bool { return s.now().After(f.Expires()) }), err
}

// failedSteps is FailedSteps with those whose time is over. What cannot be read is removed.
func (s *Store) failedSteps() ([]*FailedStep, error) {
	entries, err := os.ReadDir(s.path(failedDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list failed steps: %w", err)
	}
	var list []*FailedStep
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		switch f, err := s.readFailed(id); {
		case err == nil:
			list = append(list, f)
		case errors.Is(err, ErrNoFailedStep):
		case !errors.Is(err, errDamagedStep):
			return nil, err // its layers must not be taken for nobody's
		default:
			slog.Warn("a failed step is forgotten", "error", err)
			_ = os.Remove(filepath.Join(s.path(failedDir), e.Name()))
		}
	}
	slices.SortFunc(list, func(a, b *FailedStep) int { return b.Created.Compare(a.Created) })
	return list, nil
}

func (s *Store) readFailed(id string) (*FailedStep, error) {
	if !validFailedID(id) {
		return nil, fmt.Errorf("failed step %q: %w", id, ErrNoFailedStep)
	}
	data, err := os.ReadFile(s.failedPath(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("failed step %s: %w", id, ErrNoFailedStep)
	}
	if err != nil {
		return nil, fmt.Errorf("failed step %s: %w", id, err)
	}
	f := &FailedStep{}
	if err := json.Unmarshal(data, f); err != nil {
		return nil, fmt.Errorf("failed step %s: %w: %w", id, errDamagedStep, err)
	}
	if f.ID != id {
		return nil, fmt.Errorf("failed step %s: %w: it calls itself %q", id, errDamagedStep, f.ID)
	}
	return f, nil
}

// FailedStep returns a step whose files are kept, or an error that wraps ErrNoFailedStep.
func (s *Store) FailedStep(id string) (*FailedStep, error) {
	f, err := s.readFailed(id)
	if err != nil {
		return nil, err
	}
	if s.now().After(f.Expires()) {
		return nil, fmt.Errorf("failed step %s: %w", id, ErrNoFailedStep)
	}
	for _, snap := range slices.Concat(f.Inputs, f.Mounts) {
		for _, l := range snap {
			if !s.Layers.Exists(l) {
				return nil, fmt.Errorf("failed step %s: %w: a layer is missing", id, ErrNoFailedStep)
			}
		}
	}
	return f, nil
}

// FailedResult returns the snapshot of a name made by InputIDs or MountIDs, or an error that wraps ErrNoFailedStep. Whoever holds a lease
// can go on using it.
func (s *Store) FailedResult(ctx context.Context, resultID string) (snapshot.Snapshot, error) {
	id, kind, i, ok := splitResultID(resultID)
	if !ok {
		return nil, fmt.Errorf("result %q: %w", resultID, ErrNoFailedStep)
	}
	f, err := s.FailedStep(id)
	if err != nil {
		return nil, err
	}
	list := f.Mounts
	if kind == "input" {
		list = f.Inputs
	} else if kind != "mount" {
		list = nil
	}
	if i >= len(list) || len(list[i]) == 0 {
		return nil, fmt.Errorf("result %q: %w", resultID, ErrNoFailedStep)
	}
	for _, l := range list[i] {
		if _, err := s.Layers.Stat(ctx, l); err != nil { // notes the use
			return nil, fmt.Errorf("failed step %s: %w: %w", id, ErrNoFailedStep, err)
		}
	}
	return list[i], nil
}

// removeFailed forgets a failed step. The next sweep takes its layers.
func (s *Store) removeFailed(id string) (bool, error) {
	err := os.Remove(s.failedPath(id))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// takeFailed makes a thing of each failed step, used when it failed.
func (st *stocktaking) takeFailed(context.Context) error {
	list, err := st.s.failedSteps()
	if err != nil {
		return err
	}
	for _, f := range list {
		u := unit{failed: true, expired: st.s.now().After(f.Expires()), Usage: Usage{
			ID: f.ID, Type: TypeRegular, Created: f.Created, LastUsed: f.Created,
			Description: "failed step, kept for 'slipway debug': " + f.Name,
		}}
		for _, snap := range slices.Concat(f.Inputs, f.Mounts) {
			stack, whole := st.stack(snap)
			u.stacks = append(u.stacks, stack)
			u.broken = u.broken || !whole
			u.InUse = u.InUse || len(stack) > 0 && st.pieces[stack[len(stack)-1]].used
		}
		st.units = append(st.units, u)
	}
	return nil
}
