// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// profileNames are those that -profile knows.
var profileNames = []string{"cpu", "trace", "block", "heap"}

// profileTime is how long a scenario is repeated for one profile, in seconds.
const profileTime = 5

// profile takes the profiles of slipway's daemon while c runs, again and again where its daemon stays the same from run to run.
func (b *bench) profile(ctx context.Context, s *scenario, c *contestant) error {
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	for _, kind := range b.profiles {
		if s.round != nil {
			if err := s.round(b, b.runs+1); err != nil {
				return err
			}
		}
		if c.before != nil {
			if err := c.before(ctx); err != nil {
				return err
			}
		}
		socket := b.peers[0].(*slipway).debugSocket
		if _, err := os.Stat(socket); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %s: no daemon whose %s profile could be taken\n", s.name, kind)
			return nil
		}
		done := make(chan error, 1)
		go func() {
			done <- fetchProfile(ctx, socket, kind, filepath.Join(b.out, s.name+"-"+kind+".pprof"))
		}()
		for begin := time.Now(); time.Since(begin) < profileTime*time.Second; {
			started := calls{ctx: ctx}
			if err := c.run(ctx, &started); err != nil {
				return err
			}
			if c.before != nil || c.after != nil {
				break // the daemon may be another one in the next run
			}
		}
		// What ends the daemon waits: the profile is complete when its time is over.
		if err := <-done; err != nil {
			return err
		}
		if c.after != nil {
			if err := c.after(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// fetchProfile writes a profile of profileTime seconds to path.
func fetchProfile(ctx context.Context, socket, kind, path string) error {
	var d net.Dialer
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", socket)
	}}}
	page := fmt.Sprintf("%s?seconds=%d", kind, profileTime)
	switch kind {
	case "cpu":
		page = fmt.Sprintf("profile?seconds=%d", profileTime)
	case "heap":
		page = "heap?gc=1"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://debug/debug/pprof/"+page, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s profile: %s", kind, resp.Status)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(f, resp.Body)
	return err
}
