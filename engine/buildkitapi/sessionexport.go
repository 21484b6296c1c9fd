// SPDX-License-Identifier: Apache-2.0

package buildkitapi

import (
	"context"
	"fmt"

	sessionexporter "github.com/moby/buildkit/session/exporter"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"

	"github.com/seed-68981b69/slipway/exporter"
)

// askForExporters asks the client which outputs it wants besides those of its request, now that there is a result.
func (s *Server) askForExporters(ctx context.Context, session *clientSession, req *request, r exporter.Result) error {
	if !req.sessionExporters || req.askedForExporters {
		return nil
	}
	req.askedForExporters = true
	caller, err := session.caller(ctx, req.session)
	if err != nil {
		return fmt.Errorf("outputs that the client chooses: %w", err)
	}
	ask := &sessionexporter.FindExportersRequest{Metadata: r.Metadata}
	for _, ref := range r.Refs {
		if n := len(ref.Snapshot); n > 0 {
			ask.Refs = append(ask.Refs, string(ref.Snapshot[n-1]))
		}
	}
	answer, err := sessionexporter.NewExporterClient(caller.Conn()).FindExporters(caller.Context(ctx), ask)
	switch code := grpcerrors.Code(err); {
	case code == codes.Unimplemented, code == codes.Unavailable:
		return nil
	case err != nil:
		return fmt.Errorf("outputs that the client chooses: %w", err)
	}
	for _, wanted := range answer.Exporters {
		e, err := s.newExporter(req, wanted.GetType(), wanted.GetAttrs())
		if err != nil {
			return err
		}
		req.exporters = append(req.exporters, e)
	}
	return nil
}

// tellExported tells a client that has chosen outputs what came of them. It may refuse, and fail the build.
func tellExported(ctx context.Context, session *clientSession, req *request, response map[string]string) error {
	if !req.sessionExporters {
		return nil
	}
	caller, err := session.caller(ctx, req.session)
	if err != nil {
		return fmt.Errorf("tell the client of its outputs: %w", err)
	}
	_, err = sessionexporter.NewExporterClient(caller.Conn()).FinalizeExport(caller.Context(ctx), &sessionexporter.FinalizeExportRequest{ExporterResponse: response})
	switch code := grpcerrors.Code(err); {
	case code == codes.Unimplemented, code == codes.Unavailable:
		return nil
	case err != nil:
		return fmt.Errorf("tell the client of its outputs: %w", err)
	}
	return nil
}
