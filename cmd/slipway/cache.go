// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/spf13/cobra"
)

// newCacheCommand holds the commands on what is kept between builds; each has a file of its own.
func newCacheCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Look after what is kept between builds",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newCacheDuCommand(a), newCachePruneCommand(a), newCacheFsckCommand(a),
		newCacheExportCommand(a), newCacheImportCommand(a), newCacheInspectCommand(a))
	return cmd
}
