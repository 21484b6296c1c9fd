// SPDX-License-Identifier: Apache-2.0

// Command slipway builds, distributes and runs container images. See root.go for the list of commands.
package main

import (
	"os"

	_ "github.com/seed-68981b69/slipway/cmd/slipway/timerslack" // the monitor of Go's runtime rests
)

func main() {
	os.Exit(Main())
}
