package main

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/cuda"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
)

// engineOf is the engine of the device that --device names.
func engineOf(name string) (quant.Engine, error) {
	if name == "" || name == "cpu" {
		return quant.CPU{}, nil
	}
	ordinal, err := cuda.Parse(name)
	if err != nil {
		return nil, usageError{fmt.Errorf("--device: %w", err)}
	}
	return cuda.NewEngine(ordinal)
}

func devicesCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "devices",
		Short: "List the CUDA devices",
		Args:  arguments(0),
		RunE: func(c *cobra.Command, _ []string) error {
			list := []cuda.Info{}
			for ordinal := range cuda.Count() {
				d, err := cuda.Describe(ordinal)
				if err != nil {
					return err
				}
				list = append(list, d)
			}
			if asJSON {
				return printJSON(c, list)
			}
			w := c.OutOrStdout()
			if len(list) == 0 {
				_, err := cuda.Describe(0) // says why
				fmt.Fprintf(w, "no CUDA device: %v\n", err)
				return nil
			}
			var rows []table.Row
			for i, d := range list {
				rows = append(rows, table.Row{fmt.Sprintf("cuda:%d", i), d.Name, fmt.Sprintf("sm_%d%d", d.Major, d.Minor), d.Multiprocessors, humanize.IBytes(d.Memory)})
			}
			printTable(w, table.Row{"device", "name", "architecture", "multiprocessors", "memory"}, rows, "multiprocessors", "memory")
			return nil
		},
	}
	jsonFlag(c, &asJSON)
	return c
}
