// SPDX-License-Identifier: Apache-2.0

package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/seed-68981b69/slipway/cache/index"
)

// A tar alone does not always say what its layer is: a parent directory that it does not name looks as in the
// layers below, and a hard link may point to a file there. So the questions put to those layers and their answers
// are part of the layer: they are kept with it, and the answers that are not the usual ones go into its ID.

// The kinds of questions.
const (
	belowStat = "stat" // what a directory looks like that the tar does not name
	belowLink = "link" // the file that a hard link points to
	belowList = "list" // the names in a directory
	belowHas  = "has"  // whether there is something that a whiteout hides
)

// belowKey writes a question as text that survives JSON, whatever bytes path has.
func belowKey(kind, path string) string { return kind + " " + strconv.Quote(path) }

// belowAnswer returns what below says. "" is the usual answer: nothing there, or an ordinary directory; for a whiteout,
// that there is something to hide.
func belowAnswer(below index.Tree, key string) (string, error) {
	kind, quoted, _ := strings.Cut(key, " ")
	path, err := strconv.Unquote(quoted)
	if err != nil {
		return "", fmt.Errorf("question %q: %w", key, err)
	}
	if below == nil {
		below = index.Merge()
	}
	switch kind {
	case belowHas:
		if _, ok := below.Lookup(path); ok {
			return "", nil
		}
		return "absent", nil
	case belowStat:
		e, ok := below.Lookup(path)
		if !ok || e.Type != index.Dir || e.Mode == 0o755 && e.UID == 0 && e.GID == 0 && len(e.Xattrs) == 0 {
			return "", nil
		}
		return hashAnswer(e.Mode, e.UID, e.GID, e.Xattrs), nil
	case belowLink:
		e, ok := below.Lookup(path)
		if !ok {
			return "", nil
		}
		return hashAnswer(e.Type, e.Mode, e.UID, e.GID, e.Size, e.ModTime, e.Digest, e.Xattrs), nil
	case belowList:
		var names []string
		for _, e := range below.ReadDir(path) {
			names = append(names, strconv.Quote(e.Path), strconv.Itoa(int(e.Type)))
		}
		if len(names) == 0 {
			return "", nil
		}
		return hashAnswer(names), nil
	}
	return "", fmt.Errorf("unknown question %q", key)
}

// hashAnswer hashes parts, which have maps with sorted keys in JSON.
func hashAnswer(parts ...any) string {
	for i, p := range parts {
		if xattrs, ok := p.(map[string]string); ok {
			quoted := make(map[string]string, len(xattrs))
			for name, value := range xattrs {
				quoted[strconv.Quote(name)] = strconv.Quote(value)
			}
			parts[i] = quoted
		}
	}
	b, err := json.Marshal(parts)
	if err != nil {
		panic("layer: " + err.Error()) // numbers and strings always marshal
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// belowVariant returns what the answers add to a layer's ID: "" if they are all the usual ones.
func belowVariant(answers map[string]string) string {
	var special []string
	for key, answer := range answers {
		if answer != "" {
			special = append(special, key+" "+answer)
		}
	}
	if len(special) == 0 {
		return ""
	}
	slices.Sort(special)
	return "-" + hashAnswer(special)
}

// sameBelow says whether below would answer every question as it was answered.
func sameBelow(answers map[string]string, below index.Tree) bool {
	for key, want := range answers {
		if got, err := belowAnswer(below, key); err != nil || got != want {
			return false
		}
	}
	return true
}
