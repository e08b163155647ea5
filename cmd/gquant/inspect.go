package main

import (
	"fmt"
	"maps"
	"slices"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
)

func inspectCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "inspect MODEL",
		Short: "List the quantized layers, tensors and metadata of a model",
		Args:  arguments(1),
		RunE: func(c *cobra.Command, args []string) error {
			m, err := checkpoint.Open(args[0])
			if err != nil {
				return err
			}
			defer m.Close()
			info := m.Inspect()
			if asJSON {
				return printJSON(c, info)
			}
			return printInspection(c, info)
		},
	}
	jsonFlag(c, &asJSON)
	return c
}

// printInspection prints tables for people.
func printInspection(c *cobra.Command, info *checkpoint.Inspection) error {
	w := c.OutOrStdout()
	for _, key := range slices.Sorted(maps.Keys(info.Metadata)) {
		value := info.Metadata[key]
		if len(value) > 100 {
			value = fmt.Sprintf("%.100s… (%d bytes)", value, len(value))
		}
		fmt.Fprintf(w, "metadata %s: %s\n", key, value)
	}
	if len(info.Layers) > 0 {
		var rows []table.Row
		for _, l := range info.Layers {
			statistics := "plain"
			if l.Nested {
				statistics = "nested"
			}
			rows = append(rows, table.Row{l.Name, l.Format, l.DType, shapeText(l.Shape), l.Blocksize, statistics, l.Convention, size(l.Bytes)})
		}
		printTable(w, table.Row{"layer", "format", "dtype", "shape", "blocksize", "statistics", "convention", "size"}, rows, "blocksize", "size")
	}
	if len(info.Tensors) > 0 {
		var rows []table.Row
		for _, t := range info.Tensors {
			rows = append(rows, table.Row{t.Name, t.DType, shapeText(t.Shape), size(t.Bytes)})
		}
		printTable(w, table.Row{"tensor", "dtype", "shape", "size"}, rows, "size")
	}
	_, err := fmt.Fprintf(w, "%d quantized layers, %d plain tensors, %s in %d file(s)\n", len(info.Layers), len(info.Tensors), size(info.Bytes), len(info.Files))
	return err
}
