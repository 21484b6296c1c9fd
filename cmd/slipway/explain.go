// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"

	"github.com/seed-68981b69/slipway/engine/explain"
)

func newExplainCommand(a *app) *cobra.Command {
	var last bool
	var step, format string
	cmd := &cobra.Command{
		Use:   "explain [flags] [BUILD | --last]",
		Short: "Say why the steps of a build ran or were found in the cache",
		Args:  args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := buildRef(args, last)
			if err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			if format != "" && format != "json" && format != "text" {
				return &usageError{fmt.Errorf("--format %s: want text or json", format), cmd.CommandPath()}
			}
			_, _, doc, err := a.explanation(cmd.Context(), ref)
			if err != nil {
				return err
			}
			choose := func(*explain.Step) bool { return true }
			if step != "" {
				one, err := findStep(doc, step)
				if err != nil {
					return err
				}
				choose = func(s *explain.Step) bool { return s == one }
			}
			if format == "json" {
				return printDocument(a.stdout(), doc, step != "", choose)
			}
			return doc.Text(a.stdout(), time.Now(), choose)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&last, "last", false, "the newest build (the default)")
	f.StringVar(&step, "step", "", "only this step: its number here, or a part of its name")
	f.StringVar(&format, "format", "", "text or json (default text)")
	return cmd
}

// printDocument prints the document, or the chosen step of it, as JSON.
func printDocument(w io.Writer, doc *explain.Document, one bool, choose func(*explain.Step) bool) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if !one {
		return enc.Encode(doc)
	}
	for _, s := range doc.Steps {
		if choose(s) {
			return enc.Encode(s)
		}
	}
	return nil
}

// buildRef is the build that a command line means; "" is the newest.
func buildRef(args []string, last bool) (string, error) {
	if len(args) == 0 {
		return "", nil
	}
	if last {
		return "", errors.New("a build or --last, not both")
	}
	return args[0], nil
}

// findStep finds a step by its number or a part of its name.
func findStep(doc *explain.Document, want string) (*explain.Step, error) {
	if n, err := strconv.Atoi(strings.TrimPrefix(want, "#")); err == nil {
		for _, s := range doc.Steps {
			if n > 0 && s.Number == n {
				return s, nil
			}
		}
		return nil, fmt.Errorf("build %s has no step %d", doc.Build, n)
	}
	var found *explain.Step
	for _, s := range doc.Steps {
		if s.Number == 0 || !strings.Contains(s.Name, want) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("several steps of build %s are like %q: %q and %q", doc.Build, want, found.Name, s.Name)
		}
		found = s
	}
	if found == nil {
		return nil, fmt.Errorf("no step of build %s is like %q", doc.Build, want)
	}
	return found, nil
}

// explanation fetches the record of a build that has ended and what is attached to it about its steps.
func (a *app) explanation(ctx context.Context, ref string) (*bkclient.Client, *controlapi.BuildHistoryRecord, *explain.Document, error) {
	client, err := a.buildkit(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	rec, err := findBuild(ctx, client, ref)
	if err != nil {
		return nil, nil, nil, err
	}
	for _, d := range rec.GetResult().GetAttestations() {
		if d.MediaType != explain.MediaType {
			continue
		}
		var doc explain.Document
		data, err := readContent(ctx, client, d.Digest)
		if err == nil {
			err = json.Unmarshal(data, &doc)
		}
		if err != nil {
			return nil, nil, nil, fmt.Errorf("explanation of build %s: %w", rec.Ref, err)
		}
		return client, rec, &doc, nil
	}
	return nil, nil, nil, fmt.Errorf("build %s has no explanation: it was made by another engine", rec.Ref)
}

// findBuild returns the record of the build with that ref or the only one that begins so; "" is the newest.
func findBuild(ctx context.Context, client *bkclient.Client, ref string) (*controlapi.BuildHistoryRecord, error) {
	req := &controlapi.BuildHistoryRequest{EarlyExit: true}
	if ref == "" {
		req.Limit = 1
	}
	stream, err := client.ControlClient().ListenBuildHistory(ctx, req)
	if err != nil {
		return nil, err
	}
	var found *controlapi.BuildHistoryRecord
	running := false
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		rec := event.Record
		switch {
		case event.Type == controlapi.BuildHistoryEventType_STARTED:
			running = running || rec.Ref == ref
		case ref == "" || rec.Ref == ref:
			return rec, nil
		case !strings.HasPrefix(rec.Ref, ref):
		case found != nil:
			return nil, fmt.Errorf("several builds begin with %q: %s and %s", ref, found.Ref, rec.Ref)
		default:
			found = rec
		}
	}
	switch {
	case found != nil:
		return found, nil
	case running:
		return nil, fmt.Errorf("build %s has not ended", ref)
	case ref == "":
		return nil, errors.New("there is no build yet")
	}
	return nil, fmt.Errorf("no such build: %s", ref)
}

// readContent returns a blob that a build's record names.
func readContent(ctx context.Context, client *bkclient.Client, digest string) ([]byte, error) {
	var data []byte
	err := copyContent(ctx, client, digest, func(b []byte) error {
		data = append(data, b...)
		return nil
	})
	return data, err
}

func copyContent(ctx context.Context, client *bkclient.Client, digest string, to func([]byte) error) error {
	stream, err := client.ContentClient().Read(ctx, &contentapi.ReadContentRequest{Digest: digest})
	if err != nil {
		return err
	}
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := to(part.Data); err != nil {
			return err
		}
	}
}
