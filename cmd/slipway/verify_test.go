// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc"
)

// foreign is a BuildKit daemon of somebody else, which ignores attributes that it does not know.
type foreign struct {
	controlapi.UnimplementedControlServer
	labels map[string]string
	solved bool
}

func (f *foreign) ListWorkers(context.Context, *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{
		ID: "w", Labels: f.labels, BuildkitVersion: &apitypes.BuildkitVersion{Version: "v0.12.3"},
	}}}, nil
}

func (f *foreign) Solve(context.Context, *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	f.solved = true
	return &controlapi.SolveResponse{}, nil
}

// TestForeignDaemon: what another daemon would ignore is an error before anything is built.
func TestForeignDaemon(t *testing.T) {
	for _, labels := range []map[string]string{nil, {"slipway.options": "slipway.other"}} {
		f := &foreign{labels: labels}
		socket := filepath.Join(t.TempDir(), "s")
		listener, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer()
		controlapi.RegisterControlServer(server, f)
		go server.Serve(listener) // ends with Stop
		t.Cleanup(server.Stop)

		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, flag := range []string{"--verify-cache", "--jobs=3"} {
			var out, errs bytes.Buffer
			a := newApp(strings.NewReader(""), &out, &errs)
			err := a.run(t.Context(), []string{"--host", "unix://" + socket, "--root", t.TempDir(), "build", flag, dir})
			name, _, _ := strings.Cut(flag, "=")
			if err == nil || !strings.HasPrefix(err.Error(), name+": the engine at ") || !strings.Contains(err.Error(), "it is BuildKit v0.12.3, or an older slipway") || f.solved {
				t.Errorf("%s: error %v, built %v", flag, err, f.solved)
			}
		}
	}
}
