// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/csv"
	"fmt"
	"strings"

	bkclient "github.com/moby/buildkit/client"
)

// cacheOptions reads the values of --cache-from and --cache-to, as docker buildx does: a reference alone is one of a registry.
func cacheOptions(flag string, specs []string) ([]bkclient.CacheOptionsEntry, error) {
	var out []bkclient.CacheOptionsEntry
	for _, spec := range specs {
		fields, err := csv.NewReader(strings.NewReader(spec)).Read()
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", flag, spec, err)
		}
		if !strings.Contains(spec, "=") {
			for _, ref := range fields {
				out = append(out, bkclient.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref}})
			}
			continue
		}
		entry := bkclient.CacheOptionsEntry{Attrs: map[string]string{}}
		for _, field := range fields {
			key, value, ok := strings.Cut(field, "=")
			if !ok {
				return nil, fmt.Errorf("%s %s: %q is not KEY=VALUE", flag, spec, field)
			}
			switch key = strings.ToLower(strings.TrimSpace(key)); key {
			case "type":
				entry.Type = value
			default:
				entry.Attrs[key] = value
			}
		}
		if entry.Type == "" {
			return nil, fmt.Errorf("%s %s: type= is missing", flag, spec)
		}
		out = append(out, entry)
	}
	return out, nil
}
