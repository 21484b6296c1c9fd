// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/opencontainers/go-digest"
)

// Bad is a value of the database that cannot be used.
type Bad struct {
	// Key is what the value was found under: a record's key, or "BUCKET/KEY".
	Key string
	// Record tells records from other values.
	Record bool
	Err    error
}

// ErrDamaged is wrapped by the error of Check when a part of the database itself cannot be read: nobody knows
// then which records it had.
var ErrDamaged = errors.New("the record database is damaged")

// Check reads the whole database and returns what cannot be used in it, together with what was dropped as
// unusable since Open. It changes nothing. A record that a reboot has cut off is not bad.
func (s *Store) Check(ctx context.Context) ([]Bad, error) {
	s.droppedMu.Lock()
	bad := slices.Clone(s.dropped)
	s.droppedMu.Unlock()
	err := s.scan(ctx, recordPrefix, func(key string, raw []byte) error {
		if _, err := s.check(raw); err != nil && !errors.Is(err, errStale) {
			bad = append(bad, Bad{Key: key, Record: true, Err: err})
		}
		return nil
	})
	if err != nil {
		return bad, err
	}
	err = s.scan(ctx, valuePrefix, func(key string, raw []byte) error {
		if _, err := unseal(raw); err != nil {
			bad = append(bad, Bad{Key: key, Err: err})
		}
		return nil
	})
	if err != nil {
		return bad, err
	}
	// An iterator of Badger that comes to a block it cannot read ends as if that had been all.
	return bad, s.Intact()
}

// Intact says whether the database can be read as a whole: what a scan has not found is not there, then. Whoever deletes
// what nothing names asks first.
func (s *Store) Intact() (err error) {
	defer func() {
		// Table.VerifyChecksum of Badger 4.9 wants to name the offset of the block that it has not been able to read.
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: a block does not match its checksum (%v)", ErrDamaged, r)
		}
	}()
	if err := s.db.VerifyChecksum(); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// Repair puts what Check has found into the folder quarantine: single values, or, when the database itself is damaged,
// all of it, beginning a new one with what can be read. Nobody else may be using the store.
func (s *Store) Repair(ctx context.Context, quarantine string) error {
	if err := os.MkdirAll(quarantine, 0o700); err != nil {
		return fmt.Errorf("repair record database: %w", err)
	}
	damaged := s.Intact() != nil
	if damaged {
		if err := s.beginAnew(filepath.Join(quarantine, "database-"+time.Now().UTC().Format("20060102T150405.000"))); err != nil {
			return fmt.Errorf("repair record database: %w", err)
		}
	}
	bad := map[string][]byte{}
	for prefix, check := range checks(s) {
		if err := s.scan(ctx, prefix, func(key string, raw []byte) error {
			if check(raw) != nil {
				bad[prefix+key] = bytes.Clone(raw)
			}
			return nil
		}); err != nil {
			return fmt.Errorf("repair record database: %w", err)
		}
	}
	for key, raw := range bad {
		name := digest.FromString(key).Encoded()[:16]
		if err := os.WriteFile(filepath.Join(quarantine, name), raw, 0o600); err != nil {
			return fmt.Errorf("repair record database: %w", err)
		}
		s.quarantine(key, raw, errUnreadable)
	}
	s.droppedMu.Lock()
	defer s.droppedMu.Unlock()
	s.dropped = nil
	return nil
}

// checks says for each prefix whether a value is good.
func checks(s *Store) map[string]func([]byte) error {
	return map[string]func([]byte) error{
		recordPrefix: func(raw []byte) error {
			if _, err := s.check(raw); !errors.Is(err, errStale) {
				return err
			}
			return nil
		},
		valuePrefix: func(raw []byte) error {
			_, err := unseal(raw)
			return err
		},
	}
}

// beginAnew renames the database to aside and begins a new one with what can be read of it.
func (s *Store) beginAnew(aside string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.db.Close(); err != nil {
		s.log.Warn("close damaged record database", "error", err)
	}
	if err := s.fs.Rename(s.dir, aside); err != nil {
		return fmt.Errorf("put aside damaged record database: %w", err)
	}
	db, err := openBadger(s.dir, s.fs, s.log)
	if err != nil {
		return fmt.Errorf("begin a new record database: %w", err)
	}
	s.db = db
	return s.salvage(aside)
}

// salvage copies what is good in the damaged database at aside. The caller holds mu, or is the only one who knows s. Badger does not
// read a table with a wrong checksum, and does not open a small one at all; without looking at checksums it reads
// what is there. Every value has a checksum of its own (seal), so that what is wrong stays behind.
func (s *Store) salvage(aside string) error {
	var w writes
	err := func() (err error) {
		defer func() {
			if r := recover(); r != nil { // Badger does not expect damage in what it has not checked
				err = fmt.Errorf("%w: %v", ErrDamaged, r)
			}
		}()
		db, err := badger.Open(badgerOptions(aside, s.log).WithChecksumVerificationMode(options.NoVerification))
		if err != nil {
			return err
		}
		defer db.Close()
		old := &Store{db: db, dir: aside, fs: s.fs, log: s.log, bootID: s.bootID}
		pending := map[string][]byte{}
		if err := old.scan(context.Background(), pendingPrefix, func(key string, raw []byte) error {
			pending[key] = bytes.Clone(raw)
			return nil
		}); err != nil {
			return err
		}
		for prefix, check := range checks(old) {
			if err := old.scan(context.Background(), prefix, func(key string, raw []byte) error {
				if check(raw) == nil {
					w.set(prefix+key, bytes.Clone(raw))
					if number := pending[key]; number != nil && prefix == recordPrefix {
						w.set(pendingPrefix+key, number)
					}
				}
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	}()
	if err != nil {
		s.log.Error("not everything in the damaged record database can be read", "dir", aside, "error", err)
	}
	if err := s.write(w, true); err != nil {
		return fmt.Errorf("save what can be read of the damaged record database: %w", err)
	}
	s.log.Warn("saved from the damaged record database", "values", len(w))
	return nil
}
