// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"encoding/base64"
	"io"
	"net/url"
)

// shortestHidden is the length in bytes of the shortest text of a secret that is looked for in output: a shorter one is in it by chance.
const shortestHidden = 6

// hidden is a text that output must not have, and what stands there instead.
type hidden struct{ text, instead []byte }

// hide keeps a secret's value out of the step's output, which is shown, and kept with the record of the build: the value, each of its lines, and the value in
// base64 and in the form that it has in addresses. A program that changes it in other ways is not stopped.
func (s *step) hide(id string, value []byte) {
	value = bytes.TrimSpace(value)
	whole := value[:len(value)/3*3] // so that its base64 is the beginning of that of a longer text, such as the value with a line break
	texts := [][]byte{
		value, []byte(base64.StdEncoding.EncodeToString(whole)), []byte(base64.URLEncoding.EncodeToString(whole)), []byte(url.QueryEscape(string(value))),
	}
	for line := range bytes.Lines(value) {
		texts = append(texts, bytes.TrimSpace(line))
	}
	seen := map[string]bool{}
	for _, h := range s.hidden {
		seen[string(h.text)] = true
	}
	for _, t := range texts {
		if len(t) >= shortestHidden && !seen[string(t)] {
			seen[string(t)] = true
			s.hidden = append(s.hidden, hidden{t, []byte("[secret " + id + "]")})
		}
	}
}

// stream is where output (1) or error output (2) of the step's process goes; flush is to be called at its end.
func (s *step) stream(n int) (w io.Writer, flush func()) {
	to := logWriter{s.env.Progress, n}
	if len(s.hidden) == 0 {
		return to, func() {}
	}
	h := &hidingWriter{to: to, hidden: s.hidden}
	return h, h.flush
}

// hidingWriter replaces what is hidden, also where it comes in several pieces. Not for concurrent use.
type hidingWriter struct {
	to     io.Writer
	hidden []hidden
	held   []byte // the end of what was written, with which something hidden may begin
}

func (w *hidingWriter) Write(p []byte) (int, error) {
	data := append(w.held, p...)
	var out []byte
	for {
		at, found := firstHidden(data, w.hidden)
		if at < 0 {
			break
		}
		out = append(append(out, data[:at]...), found.instead...)
		data = data[at+len(found.text):]
	}
	keep := 0
	for _, h := range w.hidden {
		for n := min(len(h.text)-1, len(data)); n > keep; n-- {
			if bytes.HasSuffix(data, h.text[:n]) {
				keep = n
			}
		}
	}
	out = append(out, data[:len(data)-keep]...)
	w.held = bytes.Clone(data[len(data)-keep:])
	if len(out) == 0 {
		return len(p), nil
	}
	if _, err := w.to.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// firstHidden is where the first hidden text begins, the longest one if several begin there; -1 when there is none.
func firstHidden(data []byte, all []hidden) (int, hidden) {
	at, found := -1, hidden{}
	for _, h := range all {
		i := bytes.Index(data, h.text)
		if i >= 0 && (at < 0 || i < at || i == at && len(h.text) > len(found.text)) {
			at, found = i, h
		}
	}
	return at, found
}

// flush writes what was held back, once nothing comes any more.
func (w *hidingWriter) flush() {
	if len(w.held) > 0 {
		_, _ = w.to.Write(w.held)
		w.held = nil
	}
}
