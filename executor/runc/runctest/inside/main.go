// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command inside is what tests run inside containers (and, to see that an attack is one, outside of them). "inside look"
// prints what a process can learn about its container, as JSON; "inside attack NAME" tries to get out of it and prints a
// line for each thing that it tried: "refused …" or "DONE …". "inside get URL" fetches a page. It does nothing that would harm a machine on which it succeeds.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "inside:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 1 && args[0] == "look" {
		seen, err := look()
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(seen)
	}
	if len(args) == 2 && args[0] == "get" {
		resp, err := http.Get(args[1])
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(os.Stdout, resp.Body)
		return err
	}
	if len(args) >= 2 && args[0] == "attack" {
		attack := attacks[args[1]]
		if attack == nil {
			return fmt.Errorf("there is no attack %q", args[1])
		}
		attack(args[2:])
		return nil
	}
	return fmt.Errorf("usage: inside look | inside attack NAME [ARG]…, got %q", args)
}
