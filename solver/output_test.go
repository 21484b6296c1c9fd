// SPDX-License-Identifier: Apache-2.0

package solver

import (
	"strings"
	"testing"

	"github.com/moby/buildkit/client"
)

// logs collects what a build shows.
type logs struct{ text strings.Builder }

func (l *logs) Write(s *client.SolveStatus) {
	for _, line := range s.Logs {
		l.text.Write(line.Data)
	}
}

// A build whose only evaluation leaves a step that goes on for another build, and comes back, sees the log once and whole.
func TestOutputIsShownOnce(t *testing.T) {
	var o output
	defer o.discard()
	var l logs
	d, v := newDisplay(&l), &Vertex{}
	o.Log(1, []byte("a\n"))
	o.join(d, v)
	o.Log(1, []byte("b\n"))
	o.leave(d, v)
	o.Log(1, []byte("c\n"))
	o.join(d, v)
	o.Log(1, []byte("d\n"))
	d.close()
	if got := l.text.String(); got != "a\nb\nc\nd\n" {
		t.Errorf("shown: %q", got)
	}
}
