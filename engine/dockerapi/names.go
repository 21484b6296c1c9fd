// SPDX-License-Identifier: Apache-2.0

package dockerapi

import (
	"crypto/rand"
	"encoding/hex"
	"math/big"
	"regexp"
	"sync"
)

// newID is the ID of a container or of an anonymous volume: 64 hexadecimal digits, as docker's.
func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Containers without a name get one of these pairs.
var (
	manners = []string{
		"able", "brisk", "bold", "bright", "calm", "clear", "deft", "eager", "early", "fair", "firm", "fleet", "fresh", "gentle", "glad", "grand",
		"hardy", "keen", "kind", "light", "lively", "loyal", "merry", "mild", "neat", "noble", "plain", "proud", "quick", "quiet", "ready", "sharp",
		"smart", "smooth", "sound", "spry", "steady", "stout", "sunny", "swift", "tidy", "true", "warm", "wise",
	}
	vessels = []string{
		"barge", "barque", "brig", "canoe", "caravel", "carrack", "catboat", "clipper", "coaster", "cog", "collier", "coracle", "corvette", "cutter",
		"dhow", "dinghy", "dory", "ferry", "freighter", "frigate", "galleon", "galley", "gig", "hulk", "junk", "kayak", "ketch", "launch", "lighter",
		"lugger", "packet", "pinnace", "punt", "schooner", "sloop", "skiff", "tender", "trawler", "tug", "wherry", "xebec", "yawl",
	}
)

// randomName returns a name that taken denies; after a few tries it adds a number.
func randomName(taken func(string) bool) string {
	for n := 0; ; n++ {
		name := pick(manners) + "_" + pick(vessels)
		if n > 5 {
			name += "_" + pick([]string{"1", "2", "3", "4", "5", "6", "7", "8", "9"}) + newID()[:n/5]
		}
		if !taken(name) {
			return name
		}
	}
}

func pick(list []string) string {
	i, err := rand.Int(rand.Reader, big.NewInt(int64(len(list))))
	if err != nil {
		return list[0]
	}
	return list[i.Int64()]
}

var (
	validName = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)
	})
	validVolume = sync.OnceValue(func() *regexp.Regexp {
		return regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)
	})
)

func checkName(name string) error {
	if !validName().MatchString(name) || len(name) > 200 {
		return invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	return nil
}

func checkVolumeName(name string) error {
	if !validVolume().MatchString(name) || len(name) > 200 {
		return invalid(`%q includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path`, name)
	}
	return nil
}
