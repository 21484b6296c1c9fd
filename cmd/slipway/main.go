// SPDX-License-Identifier: Apache-2.0

// Command slipway builds, distributes and runs container images. See root.go for the list of commands.
package main

import "os"

func main() {
	os.Exit(Main())
}
