// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"os"
	"strings"

	bkclient "github.com/moby/buildkit/client"
	"github.com/sirupsen/logrus"

	"github.com/seed-68981b69/slipway/cache/share/s3"
)

// cacheLogs shows what BuildKit's client and containerd log about the directories of local caches as our other messages, but for what is no matter of the
// user's.
type cacheLogs struct{}

// Format implements logrus.Formatter.
func (cacheLogs) Format(e *logrus.Entry) ([]byte, error) {
	if strings.HasPrefix(e.Message, "failed check for fsverity support") {
		return nil, nil
	}
	line := fmt.Sprintf("slipway: %s: %s", e.Level, e.Message)
	if err := e.Data[logrus.ErrorKey]; err != nil {
		line += fmt.Sprint(": ", err)
	}
	return []byte(line + "\n"), nil
}

// cacheOptions reads the values of --cache-from and --cache-to, as docker buildx does: a reference alone is one of a registry.
func cacheOptions(flag string, specs []string) ([]bkclient.CacheOptionsEntry, error) {
	if len(specs) > 0 {
		logrus.SetFormatter(cacheLogs{})
		logrus.SetLevel(logrus.WarnLevel)
	}
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
		last := ""
		for _, field := range fields {
			key, value, ok := strings.Cut(field, "=")
			if !ok && last == "mounts" { // mounts=ID,ID
				entry.Attrs[last] += "," + field
				continue
			}
			if !ok {
				return nil, fmt.Errorf("%s %s: %q is not KEY=VALUE", flag, spec, field)
			}
			switch key = strings.ToLower(strings.TrimSpace(key)); key {
			case "type":
				entry.Type = value
			default:
				entry.Attrs[key] = value
			}
			last = key
		}
		if entry.Type == "" {
			return nil, fmt.Errorf("%s %s: type= is missing", flag, spec)
		}
		if entry.Type == "s3" {
			if err := addCredentials(entry.Attrs); err != nil {
				return nil, fmt.Errorf("%s %s: %w", flag, spec, err)
			}
		}
		out = append(out, entry)
	}
	return out, nil
}

// addCredentials adds those that this process has for S3, and the region, unless there are some: the engine has none.
func addCredentials(attrs map[string]string) error {
	if attrs["region"] == "" {
		if region := cmp.Or(os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION")); region != "" {
			attrs["region"] = region
		}
	}
	if attrs["access_key_id"] != "" || attrs["secret_access_key"] != "" {
		return nil
	}
	id, secret, token, err := s3.Ambient()
	if err != nil {
		return fmt.Errorf("credentials for S3: %w", err)
	}
	for name, value := range map[string]string{"access_key_id": id, "secret_access_key": secret, "session_token": token} {
		if value != "" {
			attrs[name] = value
		}
	}
	return nil
}
