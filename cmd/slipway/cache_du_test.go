// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"testing"
	"time"
)

func TestUsageFilters(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want []string
		age  time.Duration
	}{
		{in: nil},
		{in: []string{"type==regular", "inuse"}, want: []string{"type==regular", "inuse"}},
		{in: []string{"type=regular"}, want: []string{"type==regular"}},
		{in: []string{"id!=x", "description~=RUN a=b"}, want: []string{"id!=x", "description~=RUN a=b"}},
		{in: []string{"until=36h"}, age: 36 * time.Hour},
		{in: []string{"until=7d", "mutable"}, want: []string{"mutable"}, age: 7 * 24 * time.Hour},
	} {
		got, age, err := usageFilters(c.in)
		if err != nil || !slices.Equal(got, c.want) || age != c.age {
			t.Errorf("%q: %q, %v, %v", c.in, got, age, err)
		}
	}
	for _, bad := range []string{"until=", "until=x", "until=-1h", "until=-3d"} {
		if _, _, err := usageFilters([]string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
