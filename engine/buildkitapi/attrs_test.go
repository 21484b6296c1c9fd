// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import "testing"

func TestTakeOptions(t *testing.T) {
	for _, c := range []struct {
		name   string
		attrs  map[string]string
		verify bool
		jobs   int
		left   int
		err    string
	}{
		{name: "none", attrs: map[string]string{"target": "x"}, left: 1},
		{name: "both", attrs: map[string]string{VerifyCacheAttr: "true", JobsAttr: "3", "no-cache": "stage"}, verify: true, jobs: 3, left: 1},
		{name: "off", attrs: map[string]string{VerifyCacheAttr: "false", "no-cache": ""}, left: 1},
		{name: "not a truth", attrs: map[string]string{VerifyCacheAttr: "maybe"}, err: "slipway.verify-cache=maybe: want true or false"},
		{name: "no jobs", attrs: map[string]string{JobsAttr: "0"}, err: "slipway.jobs=0: want a number from 1"},
		{name: "unknown", attrs: map[string]string{"slipway.speed": "11"}, err: "unknown attribute slipway.speed"},
		{name: "no cache", attrs: map[string]string{VerifyCacheAttr: "1", "no-cache": ""}, err: "slipway.verify-cache compares with the cache that no-cache leaves out"},
	} {
		t.Run(c.name, func(t *testing.T) {
			own, err := takeOptions(c.attrs)
			if c.err != "" {
				if err == nil || err.Error() != c.err {
					t.Errorf("error %v, want %s", err, c.err)
				}
				return
			}
			if err != nil || own.verifyCache != c.verify || own.jobs != c.jobs || len(c.attrs) != c.left {
				t.Errorf("got %+v, %v, left %v", own, err, c.attrs)
			}
		})
	}
	if HasOption(map[string]string{OptionsLabel: ownOptions}, "slipway.job") || !HasOption(map[string]string{OptionsLabel: ownOptions}, JobsAttr) {
		t.Error("the label does not say what there is")
	}
}
