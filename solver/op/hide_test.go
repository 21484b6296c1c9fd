// SPDX-License-Identifier: Apache-2.0

package op

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestHide cuts output into pieces at random: what comes out has no secret in it, and everything else.
func TestHide(t *testing.T) {
	for _, c := range []struct{ secret, in, want string }{
		{"hush-hush\n", "a hush-hush b hush-hus hush-hushhush-hush", "a [secret x] b hush-hus [secret x][secret x]"},
		{"hush-hush", "hush-hus", "hush-hus"},
		{"aaaaaab", "aaaaaaaaaaab", "aaaaa[secret x]"},
		{"aaaaaab", "aaaaaaaaaaa", "aaaaaaaaaaa"},
		{"short", "short", "short"},
		{"line one\nline two\nx\n", "line two, then line one\nline two\nx", "[secret x], then [secret x]"},
		{"line one\nline two\n", "line one\r\nline two\r\n", "[secret x]\r\n[secret x]\r\n"},
		{"pass word", "cGFzcyB3b3Jk pass+word", "[secret x] [secret x]"},
		{"", "any", "any"},
	} {
		s := &step{}
		s.hide("x", []byte(c.secret))
		s.hide("x", []byte(c.secret))
		for range 200 {
			var out bytes.Buffer
			w := &hidingWriter{to: &out, hidden: s.hidden}
			for in := []byte(c.in); len(in) > 0; {
				n := 1 + rand.IntN(len(in))
				if m, err := w.Write(in[:n]); m != n || err != nil {
					t.Fatal(m, err)
				}
				in = in[n:]
			}
			// What is a whole secret once the next piece is there is not printed before.
			if s := strings.TrimSpace(c.secret); len(s) >= shortestHidden && strings.Contains(out.String(), s) {
				t.Fatalf("%q of %q", out.String(), c.in)
			}
			w.flush()
			// A line may be replaced before its secret is whole: the longest one wins only within a piece.
			if got := out.String(); got != c.want && !strings.Contains(c.secret, "\n") {
				t.Fatalf("%q of %q, want %q", got, c.in, c.want)
			}
			for line := range strings.Lines(c.secret) {
				if line = strings.TrimSpace(line); len(line) >= shortestHidden && strings.Contains(out.String(), line) {
					t.Fatalf("%q of %q", out.String(), c.in)
				}
			}
		}
	}
}
