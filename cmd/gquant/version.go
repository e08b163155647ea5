package main

import (
	"fmt"
	"runtime"

	"github.com/gquant/gquant/core/kernel"
	"github.com/spf13/cobra"
)

func versionCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version and what this machine's processor is used for",
		Args:  arguments(0),
		RunE: func(c *cobra.Command, _ []string) error {
			info := struct {
				Version string   `json:"version"`
				Go      string   `json:"go"`
				CPU     string   `json:"cpu"`
				Levels  []string `json:"cpu_levels"`
			}{version, runtime.Version(), kernel.Level(), kernel.Levels()}
			if asJSON {
				return printJSON(c, info)
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "gquant %s (%s, cpu %s of %v)\n", info.Version, info.Go, info.CPU, info.Levels)
			return err
		},
	}
	jsonFlag(c, &asJSON)
	return c
}
