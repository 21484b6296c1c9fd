// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"regexp"
	"strings"
	"sync"

	"github.com/seed-68981b69/slipway/cache/record"
	"github.com/seed-68981b69/slipway/solver"
)

// secretName matches names of variables that should not have been used for a secret, and are.
var secretName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?i)(^|[_-])(apikey|auth|credentials?|key|passwd|password|pword|pwd|secret|token)([_-]|$)`)
})

// publicName matches exceptions.
var publicName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?i)(^|[_-])public([_-]|$)`)
})

// userinfo is what stands before the host in a URL.
var userinfo = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s"']+@`)
})

// minHidden is the shortest value that is looked for in other texts.
const minHidden = 4

// minInText is the shortest value that is looked for in what programs print, where shorter ones are words too often ("true", "main").
const minInText = 8

// Redactor keeps secrets out of what is stored of a build: credentials in URLs, and the values of variables whose names say that they
// are secret, wherever they stand. Secrets that were given as such are not in keys and so not in documents. It is the one place where that
// is decided, for documents, errors, progress and logs.
type Redactor struct {
	salt   string
	hidden map[string]string // value → what stands for it
}

func newRedactor(salt string) *Redactor { return &Redactor{salt: salt, hidden: map[string]string{}} }

// NewRedactor learns what is secret from a request's attributes and from what its steps' keys were made of.
func NewRedactor(salt string, attrs map[string]string, reports []solver.Report) *Redactor {
	r := newRedactor(salt)
	r.learnAttrs(attrs)
	for i := range reports {
		for _, p := range reports[i].RecipeParts {
			if name, ok := strings.CutPrefix(p.Name, "env "); ok {
				r.learn(name, p.Value)
			}
		}
	}
	return r
}

// Text redacts words for people: errors, names of steps, what they print. A secret that a program prints in two pieces is not found.
func (r *Redactor) Text(s string) string {
	for value, mark := range r.hidden {
		if len(value) >= minInText {
			s = strings.ReplaceAll(s, value, mark)
		}
	}
	if !strings.Contains(s, "://") {
		return s
	}
	return userinfo().ReplaceAllString(s, "${1}xxxxx@")
}

func isSecretName(name string) bool {
	return secretName().MatchString(name) && !publicName().MatchString(name)
}

func (r *Redactor) learn(name, value string) {
	if len(value) >= minHidden && isSecretName(name) {
		r.hidden[value] = r.mark(value)
		// As it stands in JSON.
		if quoted, err := json.Marshal(value); err == nil {
			r.hidden[string(quoted[1:len(quoted)-1])] = r.mark(value)
		}
	}
}

// cacheImports is the attribute in which clients tell frontends of the caches that the build may use: JSON, with what opens them (an S3
// bucket's key).
const cacheImports = "cache-imports"

// learnAttrs learns from the attributes of a build request.
func (r *Redactor) learnAttrs(attrs map[string]string) {
	for name, value := range attrs {
		r.learn(strings.TrimPrefix(name, "build-arg:"), value)
	}
	r.learnCaches(attrs[cacheImports])
}

func (r *Redactor) learnCaches(value string) {
	var caches []struct{ Attrs map[string]string }
	if json.Unmarshal([]byte(value), &caches) != nil {
		return // nobody can use it either
	}
	for _, c := range caches {
		for name, value := range c.Attrs {
			r.learn(name, value)
		}
	}
}

// mark stands for a value: equal values have equal marks, unless there is no salt.
func (r *Redactor) mark(value string) string {
	if r.salt == "" {
		return "(not shown)"
	}
	h := hmac.New(sha256.New, []byte(r.salt))
	h.Write([]byte(value))
	return "(not shown, " + hex.EncodeToString(h.Sum(nil)[:4]) + ")"
}

func (r *Redactor) text(s string) string {
	for value, mark := range r.hidden {
		s = strings.ReplaceAll(s, value, mark)
	}
	return userinfo().ReplaceAllString(s, "${1}xxxxx@")
}

func (r *Redactor) part(p record.Part) record.Part {
	if kind, name, ok := strings.Cut(p.Name, " "); ok && (kind == "env" || kind == "header") && isSecretName(name) && p.Value != "" {
		return record.Part{Name: p.Name, Value: r.mark(p.Value)}
	}
	return record.Part{Name: p.Name, Value: r.text(p.Value)}
}

// Attrs returns the attributes of a build request for its record: without secrets.
func Attrs(attrs map[string]string, salt string) map[string]string {
	r := newRedactor(salt)
	r.learnCaches(attrs[cacheImports])
	out := maps.Clone(attrs)
	for name, value := range attrs {
		out[name] = r.text(value)
		if arg, ok := strings.CutPrefix(name, "build-arg:"); ok && isSecretName(arg) && value != "" {
			out[name] = r.mark(value)
		}
	}
	return out
}

// Hide returns a function that makes records fit for the eyes of others: it returns rec as it is, or a copy in which what should not
// have been used for a secret is not shown. attrs are those of the build request.
func Hide(attrs map[string]string) func(rec *record.Record) (shown *record.Record, hidden bool) {
	r := newRedactor("")
	r.learnAttrs(attrs)
	return func(rec *record.Record) (*record.Record, bool) {
		for _, p := range rec.Parts {
			if name, ok := strings.CutPrefix(p.Name, "env "); ok {
				r.learn(name, p.Value)
			}
		}
		shown := *rec
		shown.Parts = make([]record.Part, len(rec.Parts))
		hidden := false
		for i, p := range rec.Parts {
			shown.Parts[i] = r.part(p)
			hidden = hidden || shown.Parts[i] != p
		}
		shown.Step.Name = r.text(rec.Step.Name)
		return &shown, hidden
	}
}
