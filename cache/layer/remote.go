// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/index"
)

// A remote layer is one whose bytes are elsewhere: the store knows its diff ID, what it lies on and where to ask for it, and
// perhaps its index. Whoever needs more than that brings it here (materialise.go), and then it is a tar like any other, under
// the same ID.

// ErrUnavailable is what errors about a remote layer wrap that cannot be brought here now.
var ErrUnavailable = errors.New("the layer is not here and cannot be fetched")

// ErrFalseIndex is what errors about a remote layer wrap whose bytes are not what the index says that came with it. The store
// does not have it any more.
var ErrFalseIndex = errors.New("the layer is not what its index says")

// Remote is a layer to be known without its bytes.
type Remote struct {
	// DiffID is the sha256 digest of its uncompressed tar.
	DiffID digest.Digest
	// TarSize is the length of that tar in bytes; 0 if it is not known.
	TarSize int64
	// Index is its table of contents; nil if it is not known. It is believed until the bytes come, and then compared.
	Index *index.Index
	// Below are the layers that it lies on, lowest first. They must be in the store.
	Below []ID
	// Origin says where the bytes are: a scheme, a colon, and words of whoever has set OnFetch for it. "" says nothing. No secrets:
	// it is written to disk.
	Origin string
}

// The most origins that are kept of a layer, and how long one may be, in bytes.
const (
	maxOrigins   = 8
	maxOriginLen = 4096
)

// AddRemote makes a layer known without its bytes and returns its ID, which is made of the diff ID and the IDs below: the same
// call gives the same one, also when the bytes have come. If the layer that Unpack would make is here already, it is that
// one. A known layer is told one more origin, and the index or size that it did not have.
func (s *Store) AddRemote(ctx context.Context, r Remote) (ID, error) {
	id, err := s.addRemote(ctx, r)
	if err != nil {
		return "", fmt.Errorf("remote layer %s: %w", r.DiffID, err)
	}
	return id, nil
}

func (s *Store) addRemote(ctx context.Context, r Remote) (ID, error) {
	if err := r.check(); err != nil {
		return "", err
	}
	if err := s.Ensure(ctx, r.Below...); err != nil {
		return "", fmt.Errorf("what it lies on: %w", err)
	}
	if id, ok, err := s.findOver(ctx, r.DiffID, r.Below); err != nil || ok {
		return id, err
	}
	id := remoteID(r.DiffID, r.Below)
	defer s.locks.lock(id)()
	m, err := s.meta(id)
	switch {
	case err == nil && !m.Remote:
		return id, nil
	case err == nil:
		return id, s.amendRemote(m, r)
	}
	m = &meta{ID: id, Remote: true, DiffID: r.DiffID, Chain: r.Below}
	if r.Index != nil {
		m.Content = r.Index.Digest()
	}
	m.learn(r)
	return id, s.installRemote(m, r.Index)
}

func (r *Remote) check() error {
	if err := r.DiffID.Validate(); err != nil {
		return err
	}
	if r.DiffID.Algorithm() != digest.SHA256 {
		return fmt.Errorf("diff IDs of algorithm %s are not supported", r.DiffID.Algorithm())
	}
	if r.TarSize < 0 {
		return fmt.Errorf("a tar of %d bytes", r.TarSize)
	}
	if len(r.Origin) > maxOriginLen {
		return fmt.Errorf("an origin of %d bytes; at most %d are kept", len(r.Origin), maxOriginLen)
	}
	return nil
}

// remoteID names the layer that the tar makes over those below. The diff ID can be read from it, so that an info which was lost
// can be made again from the tar, and believed.
func remoteID(diffID digest.Digest, below []ID) ID {
	h := sha256.New()
	for _, id := range below {
		fmt.Fprintln(h, id)
	}
	return ID("r" + diffID.Encoded() + "-" + hex.EncodeToString(h.Sum(nil)[:16]))
}

// findOver is FindDiffID over layers of which some may be remote: what those have in them is not known for sure.
func (s *Store) findOver(ctx context.Context, diffID digest.Digest, below []ID) (ID, bool, error) {
	found, err := s.withDiffID(diffID)
	if err != nil || len(found) == 0 {
		return "", false, err
	}
	here := true
	for _, id := range below {
		m, err := s.meta(id)
		if err != nil {
			return "", false, err
		}
		here = here && !m.Remote
	}
	if !here {
		// One that has asked nothing is the same over anything.
		i := slices.IndexFunc(found, func(m *meta) bool { return len(m.Below) == 0 })
		if i < 0 {
			return "", false, nil
		}
		return found[i].ID, true, nil
	}
	stack, err := s.stack(ctx, below)
	if err != nil {
		return "", false, err
	}
	for _, m := range found {
		if sameBelow(m.Below, stack) {
			return m.ID, true, nil
		}
	}
	return "", false, nil
}

// learn takes over what r knows and m does not, but for the index. It says whether there was anything.
func (m *meta) learn(r Remote) (changed bool) {
	if m.TarSize == 0 && r.TarSize != 0 {
		m.TarSize, changed = r.TarSize, true
	}
	if r.Origin != "" && !slices.Contains(m.Origins, r.Origin) {
		m.Origins = append([]string{r.Origin}, m.Origins...)
		m.Origins = m.Origins[:min(len(m.Origins), maxOrigins)]
		changed = true
	}
	return changed
}

// installRemote puts a new remote layer in its place. The caller holds its lock. It is not synced, like a committed tree (durable.go): in another
// boot it counts if a Sync has covered it, and otherwise it is asked for again.
func (s *Store) installRemote(m *meta, x *index.Index) error {
	var raw []byte
	m.Size = 4096 // the info
	if x != nil {
		raw = x.Encode()
		m.Size += (int64(len(raw)) + 4095) &^ 4095
	}
	s.add(m.Size) // before it has its number: this may wait for a collection, and a sync waits for whoever has a number
	defer s.boot.begin(m)()
	tmp, err := s.newTmp()
	if err != nil {
		return err
	}
	if x != nil {
		err = s.writeFile(filepath.Join(tmp, indexFile), raw, false)
	}
	if err == nil {
		err = s.writeMeta(filepath.Join(tmp, infoFile), m, false)
	}
	if err == nil {
		err = s.install(tmp, m, x, false)
	}
	if err != nil {
		s.removeAll(tmp)
	}
	return err
}

// amendRemote tells a remote layer what r knows and it does not. The caller holds its lock.
func (s *Store) amendRemote(old *meta, r Remote) error {
	m := *old
	m.Origins = slices.Clone(old.Origins)
	changed := m.learn(r)
	if m.Content == "" && r.Index != nil {
		m.Content, changed = r.Index.Digest(), true
		// The index first: only an info with a content digest says that there is one.
		if err := s.replaceFile(m.ID, indexFile, r.Index.Encode()); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	m.Size = diskUsage(s.path(m.ID, ""))
	if err := s.replaceInfo(&m); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.metas[m.ID] != nil {
		s.metas[m.ID] = &m
	}
	return nil
}

// Forget removes a layer that is remote, as one does whose bytes turn out to be gone for good: what names it is a miss from then
// on. Any other layer stays.
func (s *Store) Forget(ctx context.Context, id ID) error {
	m, err := s.load(id)
	if errors.Is(err, ErrNotFound) || err == nil && !m.Remote {
		return nil
	}
	if err != nil {
		return err
	}
	s.cancelFetch(id)
	defer s.locks.lock(id)()
	if m, err := s.load(id); err != nil || !m.Remote {
		return nil
	}
	trash, _, err := s.vanish(id, func(ID) bool { return true })
	if trash != "" {
		s.removeAll(trash)
	}
	if err != nil {
		return fmt.Errorf("forget layer %s: %w", id, err)
	}
	return nil
}

// remoteIndex reads the index that a remote layer has come with; nil if there is none that can be read.
func (s *Store) remoteIndex(m *meta) *index.Index {
	if m.Content == "" {
		return nil
	}
	x, err := checkIndex(s.path(m.ID, indexFile), m)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			s.log.Warn("layer store: the index of a remote layer cannot be read", "layer", m.ID, "err", err)
		}
		return nil
	}
	return x
}
