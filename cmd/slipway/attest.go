// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/tonistiigi/go-csvvalue"
)

// attestOptions are the flags by which a build is asked for attestations.
type attestOptions struct {
	attest     []string
	provenance string
	sbom       string
}

// addAttrs translates them into the frontend's attributes, as docker buildx does. Of several for one type the last counts.
func (o attestOptions) addAttrs(attrs map[string]string) error {
	specs := []struct{ flag, text string }{}
	for _, text := range o.attest {
		specs = append(specs, struct{ flag, text string }{"--attest", text})
	}
	for _, short := range []struct{ typ, text string }{{"provenance", o.provenance}, {"sbom", o.sbom}} {
		if short.text == "" {
			continue
		}
		text := "type=" + short.typ + "," + short.text
		if on, err := strconv.ParseBool(short.text); err == nil {
			text = fmt.Sprintf("type=%s,disabled=%t", short.typ, !on)
		}
		specs = append(specs, struct{ flag, text string }{"--" + short.typ, text})
	}
	for _, spec := range specs {
		typ, value, err := parseAttest(spec.text)
		if err != nil {
			return fmt.Errorf("%s %s: %w", spec.flag, spec.text, err)
		}
		key := "attest:" + typ
		delete(attrs, key)
		if value != disabledAttest {
			attrs[key] = value
		}
	}
	return nil
}

// disabledAttest stands for an attestation that is not wanted.
const disabledAttest = "disabled=true"

// parseAttest reads type=TYPE,KEY=VALUE… into the type and the rest.
func parseAttest(text string) (typ, value string, err error) {
	fields, err := csvvalue.Fields(text, nil)
	if err != nil {
		return "", "", err
	}
	var rest []string
	for _, field := range fields {
		key, v, ok := strings.Cut(field, "=")
		switch {
		case !ok:
			return "", "", fmt.Errorf("%q is not KEY=VALUE", field)
		case key == "type":
			typ = v
		case key == "disabled":
			off, err := strconv.ParseBool(v)
			if err != nil {
				return "", "", fmt.Errorf("disabled=%s is not true or false", v)
			}
			if off {
				value = disabledAttest
			}
		default:
			if strings.ContainsAny(field, ",\"") {
				field = `"` + strings.ReplaceAll(field, `"`, `""`) + `"`
			}
			rest = append(rest, field)
		}
	}
	if typ != "provenance" && typ != "sbom" {
		return "", "", fmt.Errorf("type %q is neither provenance nor sbom", typ)
	}
	if value == "" {
		value = strings.Join(rest, ",")
	}
	return typ, value, nil
}

// provenanceMetadata are the entries of --metadata-file about where the result comes from: the predicates that the engine keeps with its
// record of the build. $BUILDX_METADATA_PROVENANCE chooses how much, as for docker buildx: min (the default), max or disabled.
func provenanceMetadata(ctx context.Context, client *bkclient.Client, ref string) (map[string]json.RawMessage, error) {
	mode := os.Getenv("BUILDX_METADATA_PROVENANCE")
	switch on, err := strconv.ParseBool(mode); {
	case mode == "", err == nil && on:
		mode = "min"
	case err == nil, mode == "disabled":
		return nil, nil
	case mode != "min" && mode != "max":
		return nil, fmt.Errorf("BUILDX_METADATA_PROVENANCE=%s: want min, max or disabled", mode)
	}
	rec, err := findBuild(ctx, client, ref)
	if err != nil {
		return nil, err
	}
	out := map[string]json.RawMessage{}
	add := func(key string, info *controlapi.BuildResultInfo) error {
		for _, d := range info.GetAttestations() {
			if !strings.HasPrefix(d.Annotations["in-toto.io/predicate-type"], "https://slsa.dev/provenance/") {
				continue
			}
			data, err := readContent(ctx, client, d.Digest)
			if err != nil {
				return fmt.Errorf("provenance of build %s: %w", ref, err)
			}
			if mode == "min" {
				if data, err = shortProvenance(data); err != nil {
					return fmt.Errorf("provenance of build %s: %w", ref, err)
				}
			}
			out[key] = data
		}
		return nil
	}
	const key = "buildx.build.provenance"
	if err := add(key, rec.Result); err != nil {
		return nil, err
	}
	for _, platform := range slices.Sorted(maps.Keys(rec.Results)) {
		if err := add(key+"/"+platform, rec.Results[platform]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// shortProvenance leaves out the definition of the build and what is known of its run.
func shortProvenance(data []byte) ([]byte, error) {
	var doc map[string]any
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	drop := func(key string, path ...string) {
		at := doc
		for _, name := range path {
			at, _ = at[name].(map[string]any)
		}
		delete(at, key)
	}
	drop("buildConfig", "buildDefinition", "internalParameters")
	drop("metadata", "runDetails")
	return json.Marshal(doc)
}
