// SPDX-License-Identifier: Apache-2.0

// Package local exports results as files into a directory of the client, over BuildKit's session protocol. The files are
// read through the layers' indexes: nothing is mounted and nothing is unpacked first.
package local

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	commonexptypes "github.com/moby/buildkit/exporter/exptypes"

	"github.com/seed-68981b69/slipway/exporter"
	"github.com/seed-68981b69/slipway/exporter/image"
)

// Options are the attributes that exports of files have in common.
type Options struct {
	// Source is the directory of the result that is exported; "" means all of it.
	Source string
	// PlatformSplit gives each platform a directory; nil means only if there may be several.
	PlatformSplit *bool
	// AttestationPrefix begins the names of the files with attestations.
	AttestationPrefix string
	// Epoch becomes the time of every file, if EpochSet; else the frontend says.
	Epoch    *time.Time
	EpochSet bool
}

// Set takes an attribute if it is one of these.
func (o *Options) Set(key, value string) (ok bool, err error) {
	switch key {
	case "src":
		if value == "" {
			return true, errors.New("empty; leave it out to export everything")
		}
		o.Source = value
	case "platform-split":
		split, err := image.ParseBool(value)
		o.PlatformSplit = &split
		return true, err
	case "attestation-prefix":
		if strings.Contains(value, "/") {
			return true, errors.New("a slash is not supported: the files are beside the result's")
		}
		o.AttestationPrefix = value
	case string(commonexptypes.OptKeySourceDateEpoch):
		o.EpochSet = true
		o.Epoch, err = image.ParseEpoch(value)
	default:
		return false, nil
	}
	return true, err
}

func (o Options) split(r exporter.Result) bool {
	if o.PlatformSplit != nil {
		return *o.PlatformSplit
	}
	return r.MultiPlatform
}

// New returns the factory for the type "local".
func New(view View) exporter.Factory {
	return func(given map[string]string) (exporter.Exporter, error) {
		e := &localExporter{view: view}
		for _, key := range slices.Sorted(maps.Keys(given)) {
			ok, err := e.opts.Set(key, given[key])
			if key == "mode" {
				ok = true
				e.mirror, err = parseMode(given[key])
			}
			if err != nil {
				return nil, fmt.Errorf("attribute %s=%s: %w", key, given[key], err)
			}
			if !ok {
				return nil, image.NotSupported(key, given[key])
			}
		}
		return e, nil
	}
}

func parseMode(value string) (mirror bool, err error) {
	switch strings.ToLower(strings.TrimSpace(value)) {
	case "", "copy":
		return false, nil
	case "delete":
		return true, nil
	}
	return false, errors.New("want copy or delete")
}

type localExporter struct {
	view   View
	opts   Options
	mirror bool
}

func (e *localExporter) Name() string { return "exporting to client directory" }

// Export implements exporter.Exporter.
func (e *localExporter) Export(ctx context.Context, r exporter.Result, opts exporter.Options) (map[string]string, error) {
	if opts.Output == nil {
		return nil, errors.New("export files: the client has no directory for them")
	}
	tree, err := NewTree(ctx, r, e.view, e.opts)
	if err != nil {
		return nil, fmt.Errorf("export files: %w", err)
	}
	err = opts.Output.Dir(ctx, tree, e.mirror, opts.Bytes("copying files", 0))
	if terr := tree.Err(); terr != nil {
		err = terr
	}
	if err != nil {
		return nil, fmt.Errorf("export files: %w", err)
	}
	return nil, nil
}
