// SPDX-License-Identifier: Apache-2.0

// Package record is the action cache: from a key to what the work it names has produced, and why.
//
// A Record is found by any of its keys (a recipe key, a content key). Beside the records the same database
// keeps small named values in buckets, for other facts that must last: image names, memoised digests.
//
// What is in a record is trusted only as far as the disk has it. The layers that a record names are written
// without fsync, so a record begins as "not durable" and counts only within the boot that wrote it: after a
// kill -9 the page cache still has everything, after a power cut the boot ID differs and the record is a miss.
// Store.Sync makes all of them durable with one syncfs. A value that cannot be read is a miss as well; it is
// logged and deleted.
package record

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/opencontainers/go-digest"

	"github.com/seed-68981b69/slipway/cache/snapshot"
)

// Part is one named part of a key, readable; never a secret.
type Part struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// The kinds of a Record, after the kind of key it was written for.
const (
	KindRecipe  = "recipe"
	KindContent = "content"
)

// Step says which step of which file a record comes from.
type Step struct {
	// Name is what progress showed.
	Name  string `json:"name,omitempty"`
	Stage string `json:"stage,omitempty"`
	File  string `json:"file,omitempty"`
	// Line counts from 1; 0 when unknown.
	Line int `json:"line,omitempty"`
}

// Record is what is known of work done: its result and where that came from.
type Record struct {
	// Outputs are the results, one for each output of the op.
	Outputs []snapshot.Snapshot `json:"outputs"`
	// Kind is KindRecipe or KindContent.
	Kind string `json:"kind,omitempty"`
	// Parts is the list that the key was made from.
	Parts []Part `json:"parts,omitempty"`
	Step  Step   `json:"step"`
	// ContentKey is, in a record of KindRecipe, the content key of the same work; "" when it was not needed.
	ContentKey string `json:"contentKey,omitempty"`
	// From names the imported cache that the record came with; "" for work of this machine.
	From string `json:"from,omitempty"`
	// Build names the build that did the work.
	Build    string    `json:"build,omitempty"`
	Created  time.Time `json:"created"`
	LastUsed time.Time `json:"lastUsed"`
	// Duration is how long the work took.
	Duration time.Duration `json:"duration,omitempty"`
	// PeakMemory is in bytes; 0 when unknown.
	PeakMemory int64 `json:"peakMemory,omitempty"`
	// Uses is how often Touch has noted a use of the record.
	Uses int `json:"uses,omitempty"`
	// Log is the blob with the work's output, "" when there was none.
	Log digest.Digest `json:"log,omitempty"`
	// BootID is the boot of the machine in which the record was written. Put sets it.
	BootID string `json:"bootID,omitempty"`
	// Durable says that everything the record names is known to be on disk. A record that is not durable counts
	// only within its boot.
	Durable bool `json:"durable,omitempty"`
}

// formatVersion is the first byte of every record. A record of another version is a miss.
const formatVersion = 1

// headerLen is the version and the CRC-32C of what follows it.
const headerLen = 1 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errUnreadable is the class of everything decode refuses.
var errUnreadable = errors.New("unreadable")

// seal puts the header in front of body.
func seal(body []byte) []byte {
	b := make([]byte, headerLen, headerLen+len(body))
	b[0] = formatVersion
	binary.BigEndian.PutUint32(b[1:], crc32.Checksum(body, castagnoli))
	return append(b, body...)
}

// unseal checks the header of b and returns what is behind it, which aliases b.
func unseal(b []byte) ([]byte, error) {
	switch {
	case len(b) < headerLen:
		return nil, fmt.Errorf("%w: %d bytes are too short", errUnreadable, len(b))
	case b[0] != formatVersion:
		return nil, fmt.Errorf("%w: format version %d, this program knows %d", errUnreadable, b[0], formatVersion)
	}
	body := b[headerLen:]
	if got, want := crc32.Checksum(body, castagnoli), binary.BigEndian.Uint32(b[1:]); got != want {
		return nil, fmt.Errorf("%w: checksum is %08x, should be %08x", errUnreadable, got, want)
	}
	return body, nil
}

// encoding and decoding are how the body of a record is written: CBOR (RFC 8949) with the names of the JSON form. Reading it takes
// a third of the time of JSON, and a look-up is mostly reading. Strings need not be UTF-8.
var (
	encoding = must(cbor.EncOptions{Time: cbor.TimeRFC3339Nano}.EncMode())
	decoding = must(cbor.DecOptions{UTF8: cbor.UTF8DecodeInvalid}.DecMode())
)

// must is for options that are constant.
func must[M any](mode M, err error) M {
	if err != nil {
		panic(err)
	}
	return mode
}

func encodeRecord(r *Record) ([]byte, error) {
	body, err := encoding.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return seal(body), nil
}

func decodeRecord(b []byte) (*Record, error) {
	body, err := unseal(b)
	if err != nil {
		return nil, err
	}
	var r Record
	if err := decoding.Unmarshal(body, &r); err != nil {
		return nil, fmt.Errorf("%w: %v", errUnreadable, err)
	}
	// A digest of a blob becomes a file name: never take one that is not a digest.
	if r.Log != "" {
		if err := r.Log.Validate(); err != nil {
			return nil, fmt.Errorf("%w: log digest %q: %v", errUnreadable, r.Log, err)
		}
	}
	return &r, nil
}
