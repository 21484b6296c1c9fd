// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"

	"github.com/seed-68981b69/slipway/cache/fsys"
)

// The first bytes of a key say what is behind it:
//
//	r/KEY            a record
//	p/KEY            KEY's record is not durable yet; the value is the number of the Put that wrote it
//	v/BUCKET/KEY     a value
const (
	recordPrefix  = "r/"
	pendingPrefix = "p/"
	valuePrefix   = "v/"
)

const (
	// maxValueBytes bounds a value and an encoded record: what is larger belongs in a blob.
	maxValueBytes = 1 << 20
	// maxKeyBytes is well below what Badger takes (65,000) and far above any key we make.
	maxKeyBytes = 4096
	// minFreeBytes must be left on the file system for a write. Badger writes to sparse files that it has mapped into
	// memory, where a full disk is not an error but a SIGBUS; its files grow by no more than this between two checks.
	minFreeBytes = 64 << 20
	// minFreeToDelete is enough to open the database and to delete, which is how a full disk gets room again.
	minFreeToDelete = 4 << 20
	// touchInterval is how exact LastUsed is: a Touch sooner after the last one writes nothing.
	touchInterval = time.Minute
	// batchBytes and batchKeys bound one transaction, below Badger's own limits for the memtable size below.
	batchBytes = 1 << 20
	batchKeys  = 4096
)

// ErrInUse is returned by Open when another process (or this one) has the database open.
var ErrInUse = errors.New("the record database is open in another process")

// Store is an open database. Its methods may be called concurrently. One process at a time has it open.
type Store struct {
	db  *badger.DB
	dir string
	log *slog.Logger
	fs  fsys.FS

	bootID string
	now    func() time.Time
	used   func(key string) // see OnUse
	// closePatience is how long Close waits for a database that cannot be written to.
	closePatience time.Duration
	closed        chan error // by Close

	mu  sync.Mutex // held by every write: read-modify-write of a record, and the order of puts and Sync
	put uint64     // number of the last Put, unique within this boot: see nextPut

	droppedMu sync.Mutex // guards dropped
	dropped   []Bad      // what quarantine has removed, but for stale records; at most maxDropped

	syncMu  sync.Mutex          // one Sync at a time; guards syncDir
	syncDir map[string]*os.File // kept open, so that syncfs reports every write error since the first call
}

// Open opens the database in dir, making it when there is none. A database that Badger cannot read is moved
// aside (dir + ".broken-TIME") with an error in the log, and a new one is begun with what is good of it: a lost record costs
// time, refusing to start would cost the build.
func Open(dir string) (*Store, error) { return OpenWith(dir, Options{}) }

// Options of a Store.
type Options struct {
	// FS is how the store reaches the disk where Badger does not do that itself; nil means fsys.OS.
	FS fsys.FS
	// BootID is the boot of the machine; "" asks the kernel.
	BootID string
}

// OpenWith is Open with options.
func OpenWith(dir string, opt Options) (*Store, error) {
	log := slog.Default().With("store", "record")
	if opt.FS == nil {
		opt.FS = fsys.OS
	}
	bootID := opt.BootID
	if bootID == "" {
		var err error
		if bootID, err = readBootID(); err != nil {
			return nil, fmt.Errorf("open record database: %w", err)
		}
	}
	db, err := openBadger(dir, opt.FS, log)
	if err != nil && unreadable(err) {
		// Opening has repaired some things that a killed process can leave; it may have been one of those.
		log.Warn("the record database is opened a second time", "dir", dir, "error", err)
		db, err = openBadger(dir, opt.FS, log)
	}
	aside := ""
	if err != nil && unreadable(err) {
		aside = asideName(dir)
		log.Error("the record database cannot be read and is put aside; what can be read of it goes into a new one",
			"dir", dir, "aside", aside, "error", err)
		if err := opt.FS.Rename(dir, aside); err != nil {
			return nil, fmt.Errorf("put aside unreadable record database: %w", err)
		}
		db, err = openBadger(dir, opt.FS, log)
	}
	if err != nil {
		return nil, fmt.Errorf("open record database %s: %w", dir, err)
	}
	s := &Store{db: db, dir: dir, log: log, fs: opt.FS, bootID: bootID, now: time.Now, syncDir: map[string]*os.File{}, closePatience: 10 * time.Second}
	// Two engines of one boot must not give two Puts the same number; the clock cannot stand still between them.
	s.put = uint64(time.Now().UnixNano())
	if aside == "" {
		// A damaged block looks like the end of the database to whoever walks through it. Checksums of 10 MB take a few milliseconds.
		if damage := s.Intact(); damage != nil {
			aside := asideName(dir)
			log.Error("the record database is damaged and is put aside; what can be read of it goes into a new one", "dir", dir, "aside", aside, "error", damage)
			if err := s.beginAnew(aside); err != nil {
				return nil, errors.Join(fmt.Errorf("open record database %s: %w", dir, err), s.db.Close())
			}
		}
	} else {
		if err := s.salvage(aside); err != nil {
			return nil, errors.Join(fmt.Errorf("open record database %s: %w", dir, err), db.Close())
		}
	}
	return s, nil
}

// badgerOptions are sized for a tool that is started and stopped, not for a server: MEASURED.md F (20 MB resident, opens
// in 10 ms).
func badgerOptions(dir string, log *slog.Logger) badger.Options {
	return badger.DefaultOptions(dir).
		WithMemTableSize(8 << 20).
		WithNumMemtables(2).
		WithValueLogFileSize(16 << 20).
		WithValueThreshold(maxValueBytes).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithNumCompactors(2).
		WithNumGoroutines(1).
		WithMetricsEnabled(false).
		WithDetectConflicts(false). // Store.mu makes writes one at a time
		WithChecksumVerificationMode(options.OnBlockRead).
		WithSyncWrites(false). // see write
		WithLogger(badgerLog{log})
}

func openBadger(dir string, fs fsys.FS, log *slog.Logger) (*badger.DB, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := room(fs, dir, minFreeToDelete); err != nil {
		return nil, err
	}
	if err := removeEmptyLogs(dir, fs); err != nil {
		return nil, err
	}
	db, err := badger.Open(badgerOptions(dir, log))
	if err != nil && strings.Contains(err.Error(), "Cannot acquire directory lock") {
		return nil, ErrInUse // Badger has no sentinel for it
	}
	return db, err
}

// asideName is where a damaged database in dir goes.
func asideName(dir string) string {
	return dir + ".broken-" + time.Now().UTC().Format("20060102T150405.000")
}

// removeEmptyLogs removes the log files that have no size yet: a process was killed while it made them. Badger would not open
// the database once with such a file.
func removeEmptyLogs(dir string, fs fsys.FS) error {
	for _, pattern := range []string{"*.mem", "*.vlog"} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, path := range paths {
			if st, err := os.Lstat(path); err != nil || st.Size() > 0 {
				continue
			}
			if err := fs.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// unreadable tells damaged contents from trouble with the system, which putting the database aside would not cure.
// Badger does not always wrap what the kernel said, so that its words have to do.
func unreadable(err error) bool {
	if errors.Is(err, ErrInUse) {
		return false
	}
	for _, errno := range []syscall.Errno{
		unix.EACCES, unix.EPERM, unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EIO, unix.ENOTDIR,
	} {
		if errors.Is(err, errno) || strings.Contains(err.Error(), errno.Error()) {
			return false
		}
	}
	return true
}

func readBootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Close closes the database. The store must not be used any more, whatever Close returns. A database that cannot be written to is an error after ten seconds.
func (s *Store) Close() error {
	s.syncMu.Lock()
	for _, f := range s.syncDir {
		f.Close()
	}
	s.syncDir = nil
	s.syncMu.Unlock()
	// Badger tries without end to write what it has in memory to a table, on a full disk for instance, or when somebody has deleted
	// the directory. It need not succeed: the same is in its log, from which the next Open takes it.
	s.closed = make(chan error, 1)
	go func() { s.closed <- s.db.Close() }()
	select {
	case err := <-s.closed:
		if err != nil {
			return fmt.Errorf("close record database: %w", err)
		}
		return nil
	case <-time.After(s.closePatience):
		return fmt.Errorf("close record database %s: it cannot be written to, see that the disk has room; nothing is lost, the next start reads its log", s.dir)
	}
}

// Get returns the record of key. An unreadable record and one that does not count any more (not durable, of
// another boot) are misses and are deleted; an error is trouble with the database itself.
func (s *Store) Get(ctx context.Context, key string) (*Record, bool, error) {
	if err := ctx.Err(); err != nil {
		return nil, false, context.Cause(ctx)
	}
	raw, err := s.get(recordPrefix + key)
	if err != nil || raw == nil {
		return nil, false, err
	}
	rec, err := s.check(raw)
	if err != nil {
		s.quarantine(recordPrefix+key, raw, err)
		return nil, false, nil
	}
	s.use(key)
	return rec, true, nil
}

// errStale is a record of another boot that never became durable.
var errStale = errors.New("written before a reboot and never made durable")

// check decodes a record and says whether it counts.
func (s *Store) check(raw []byte) (*Record, error) {
	rec, err := decodeRecord(raw)
	if err != nil {
		return nil, err
	}
	if !rec.Durable && rec.BootID != s.bootID {
		return nil, errStale
	}
	return rec, nil
}

// Item is a record and the keys it is put under.
type Item struct {
	Record *Record
	Keys   []string
}

// Put stores rec under each of keys, replacing what was there. BootID is set by Put; Created and LastUsed when
// they are zero. rec itself is not changed.
//
// A record that says Durable is on disk when Put returns. One that is not is safe against the death of the
// process, not of the machine: it would not count after a reboot, so waiting for the disk would gain nothing.
func (s *Store) Put(ctx context.Context, rec *Record, keys ...string) error {
	return s.PutBatch(ctx, []Item{{rec, keys}})
}

// PutBatch is Put of many records, which reach the disk together. It is not atomic: after an error or a crash a
// part of them may be there.
func (s *Store) PutBatch(ctx context.Context, items []Item) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	now := s.now().UTC()
	durable := false
	s.mu.Lock()
	defer s.mu.Unlock()
	var w writes
	for _, it := range items {
		rec := *it.Record
		rec.BootID = s.bootID
		if rec.Created.IsZero() {
			rec.Created = now
		}
		if rec.LastUsed.IsZero() {
			rec.LastUsed = now
		}
		raw, err := encodeRecord(&rec)
		if err != nil {
			return err
		}
		durable = durable || rec.Durable
		for _, key := range it.Keys {
			s.use(key)
			w.set(recordPrefix+key, raw)
			if rec.Durable {
				w.del(pendingPrefix + key)
			} else {
				w.set(pendingPrefix+key, s.nextPut())
			}
		}
	}
	if err := s.write(w, durable); err != nil {
		return fmt.Errorf("put record: %w", err)
	}
	return nil
}

// nextPut numbers a Put of a record that is not durable. The caller holds mu.
func (s *Store) nextPut() []byte {
	s.put++
	return binary.BigEndian.AppendUint64(nil, s.put)
}

// Delete removes the records of keys; those that are not there are passed over.
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var w writes
	for _, key := range keys {
		w.del(recordPrefix + key)
		w.del(pendingPrefix + key)
	}
	if err := s.write(w, true); err != nil {
		return fmt.Errorf("delete record: %w", err)
	}
	return nil
}

// Touch notes that the records of keys were used now, to the minute. Keys without a record are passed over. It
// does not wait for the disk.
func (s *Store) Touch(keys ...string) error {
	now := s.now().UTC()
	s.mu.Lock()
	defer s.mu.Unlock()
	var w writes
	for _, key := range keys {
		raw, err := s.get(recordPrefix + key)
		if err != nil {
			return fmt.Errorf("touch record: %w", err)
		}
		if raw == nil {
			continue
		}
		rec, err := s.check(raw)
		if err != nil || now.Sub(rec.LastUsed) < touchInterval {
			continue
		}
		rec.LastUsed = now
		rec.Uses++
		if raw, err = encodeRecord(rec); err != nil {
			return fmt.Errorf("touch record: %w", err)
		}
		w.set(recordPrefix+key, raw)
	}
	if err := s.write(w, false); err != nil {
		return fmt.Errorf("touch record: %w", err)
	}
	return nil
}

// Walk calls fn for every record that counts, in the order of the keys, as they were when Walk began. fn may
// call any method of the store. Unreadable records and those that do not count any more are deleted.
func (s *Store) Walk(ctx context.Context, fn func(key string, rec *Record) error) error {
	type bad struct {
		key string
		raw []byte
		err error
	}
	var bads []bad
	err := s.scan(ctx, recordPrefix, func(key string, raw []byte) error {
		rec, err := s.check(raw)
		if err != nil {
			bads = append(bads, bad{recordPrefix + key, bytes.Clone(raw), err})
			return nil
		}
		return fn(key, rec)
	})
	for _, b := range bads {
		s.quarantine(b.key, b.raw, b.err)
	}
	return err
}

// Sync makes every record that was put before the call durable: everything written to the file system of dir
// (where the layers are) goes to the disk with one syncfs, then the records are marked. It may take as long as
// the disk has work; call it in the background.
func (s *Store) Sync(ctx context.Context, dir string) error {
	return s.SyncWith(ctx, func(context.Context) error { return s.syncfs(dir) })
}

// SyncWith is Sync with a function that makes durable whatever the records name. It is not called when every record is
// durable already.
func (s *Store) SyncWith(ctx context.Context, sync func(context.Context) error) error {
	s.syncMu.Lock()
	defer s.syncMu.Unlock()
	// What is put from here on may name layers that sync will miss: the number of the Put tells.
	pending := map[string][]byte{}
	err := s.scan(ctx, pendingPrefix, func(key string, number []byte) error {
		pending[key] = bytes.Clone(number)
		return nil
	})
	if err != nil {
		return fmt.Errorf("sync store: %w", err)
	}
	if len(pending) == 0 {
		return nil
	}
	if err := sync(ctx); err != nil {
		return fmt.Errorf("sync what the records name: %w", err)
	}
	if err := s.markDurable(pending); err != nil {
		return fmt.Errorf("mark records durable: %w", err)
	}
	return nil
}

// syncfs writes the file system of dir to its disk. The caller holds syncMu.
func (s *Store) syncfs(dir string) error {
	f := s.syncDir[dir]
	if f == nil {
		if s.syncDir == nil {
			return os.ErrClosed
		}
		var err error
		if f, err = os.Open(dir); err != nil {
			return err
		}
		s.syncDir[dir] = f
	}
	return s.fs.SyncFS(f)
}

// markDurable marks the records of pending that were not put again since, and writes them to the disk.
func (s *Store) markDurable(pending map[string][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var w writes
	for key, number := range pending {
		now, err := s.get(pendingPrefix + key)
		if err != nil {
			return err
		}
		if !bytes.Equal(now, number) {
			continue
		}
		w.del(pendingPrefix + key)
		raw, err := s.get(recordPrefix + key)
		if err != nil {
			return err
		}
		rec, err := s.check(raw)
		if err != nil { // also a record of an earlier boot: what it names was never synced in that boot
			w.del(recordPrefix + key)
			continue
		}
		rec.Durable = true
		if raw, err = encodeRecord(rec); err != nil {
			return err
		}
		w.set(recordPrefix+key, raw)
	}
	return s.write(w, true)
}

// quarantine deletes the value raw of key, which cannot be used because of why, unless it was replaced meanwhile.
func (s *Store) quarantine(key string, raw []byte, why error) {
	level := slog.LevelWarn
	if errors.Is(why, errStale) {
		level = slog.LevelDebug // the normal course of things after a reboot
	}
	if !errors.Is(why, errStale) {
		s.drop(key, why)
	}
	s.log.Log(context.Background(), level, "dropping a value that cannot be used", "key", key, "bytes", len(raw), "error", why)
	s.mu.Lock()
	defer s.mu.Unlock()
	if now, err := s.get(key); err != nil || !bytes.Equal(now, raw) {
		return
	}
	var w writes
	w.del(key)
	if k, ok := strings.CutPrefix(key, recordPrefix); ok {
		w.del(pendingPrefix + k)
	}
	if err := s.write(w, false); err != nil {
		s.log.Error("drop unusable value", "key", key, "error", err)
	}
}

// maxDropped bounds what is remembered for Check.
const maxDropped = 1000

func (s *Store) drop(key string, why error) {
	s.droppedMu.Lock()
	defer s.droppedMu.Unlock()
	if len(s.dropped) < maxDropped {
		name, isRecord := strings.CutPrefix(key, recordPrefix)
		if !isRecord {
			name = strings.TrimPrefix(key, valuePrefix)
		}
		s.dropped = append(s.dropped, Bad{Key: name, Record: isRecord, Err: why})
	}
}

// get returns the raw value of a prefixed key, nil when there is none. A block of the database that fails its checksum
// is none as well, with an error in the log.
func (s *Store) get(key string) ([]byte, error) {
	var raw []byte
	err := s.db.View(func(txn *badger.Txn) error {
		it, err := txn.Get([]byte(key))
		if err != nil {
			return err
		}
		if raw, err = it.ValueCopy(nil); err == nil && raw == nil {
			raw = []byte{}
		}
		return err
	})
	switch {
	case errors.Is(err, badger.ErrKeyNotFound):
		return nil, nil
	case err != nil && strings.Contains(err.Error(), "checksum"):
		s.log.Error("a damaged part of the record database is passed over", "key", key, "error", err)
		return nil, nil
	}
	return raw, err
}

// scan calls fn for every key with the prefix, which is cut off; raw is only valid during the call.
func (s *Store) scan(ctx context.Context, prefix string, fn func(key string, raw []byte) error) error {
	return s.db.View(func(txn *badger.Txn) error {
		opt := badger.DefaultIteratorOptions
		opt.Prefix = []byte(prefix)
		it := txn.NewIterator(opt)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			key := string(it.Item().Key()[len(prefix):])
			if err := it.Item().Value(func(raw []byte) error { return fn(key, raw) }); err != nil {
				return err
			}
		}
		return nil
	})
}

// writes is a list of changes; a nil value deletes.
type writes []struct {
	key   string
	value []byte
}

func (w *writes) set(key string, value []byte) {
	*w = append(*w, struct {
		key   string
		value []byte
	}{key, value})
}

func (w *writes) del(key string) { w.set(key, nil) }

// write carries out w, in order, in as few transactions as Badger allows. The caller holds mu.
//
// Badger's log is mapped into memory: what a transaction has written outlives the process at once, and the
// machine after db.Sync.
func (s *Store) write(w writes, sync bool) error {
	if len(w) == 0 {
		return nil
	}
	need := int64(minFreeToDelete)
	for _, c := range w {
		if c.value != nil {
			need = minFreeBytes
		}
		if len(c.key) > maxKeyBytes {
			return fmt.Errorf("key of %d bytes is too long (%q…)", len(c.key), c.key[:64])
		}
		if len(c.value) > maxValueBytes {
			return fmt.Errorf("value of %d bytes is too large for the record database (key %q)", len(c.value), c.key)
		}
	}
	if err := room(s.fs, s.dir, need); err != nil {
		return err
	}
	for len(w) > 0 {
		n, bytes := 0, 0
		for n < len(w) && n < batchKeys {
			bytes += len(w[n].key) + len(w[n].value) + 64
			if n > 0 && bytes > batchBytes {
				break
			}
			n++
		}
		err := s.db.Update(func(txn *badger.Txn) error {
			for _, c := range w[:n] {
				var err error
				if c.value == nil {
					err = txn.Delete([]byte(c.key))
				} else {
					err = txn.Set([]byte(c.key), c.value)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		w = w[n:]
	}
	if sync {
		return s.db.Sync()
	}
	return nil
}

// room is an error that wraps ENOSPC when fewer than need bytes are left on the file system of dir.
func room(fs fsys.FS, dir string, need int64) error {
	free, err := fs.Free(dir)
	if err != nil {
		return err
	}
	if free < need {
		return fmt.Errorf("%s: %w: %d MB left, at least %d MB are needed", filepath.Clean(dir), unix.ENOSPC, free>>20, need>>20)
	}
	return nil
}

// badgerLog sends Badger's log to slog, where only debugging shows it; its errors also come back as errors.
type badgerLog struct{ log *slog.Logger }

func (l badgerLog) print(format string, v ...any) {
	if l.log.Enabled(context.Background(), slog.LevelDebug) {
		l.log.Debug("badger: " + strings.TrimSpace(fmt.Sprintf(format, v...)))
	}
}
func (l badgerLog) Errorf(format string, v ...any)   { l.print(format, v...) }
func (l badgerLog) Warningf(format string, v ...any) { l.print(format, v...) }
func (l badgerLog) Infof(format string, v ...any)    { l.print(format, v...) }
func (l badgerLog) Debugf(format string, v ...any)   { l.print(format, v...) }
