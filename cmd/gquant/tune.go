package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/gquant/gquant/cuda"
	"github.com/spf13/cobra"
)

func tuneCommand() *cobra.Command {
	var device, output string
	var asJSON, force bool
	c := &cobra.Command{
		Use:   "tune",
		Short: "Measure which kernels compute linear layers fastest on a CUDA device, and write its table",
		Long: "Measure which kernels compute linear layers with 4-bit weights fastest on a CUDA device, for the shapes and numbers of rows that models have,\n" +
			"and write the table of them. Programs use it where " + cuda.TuneVariable + " is its path; the tables that gquant brings were made so.\n" +
			"Nothing else should run on the device meanwhile.",
		Args: arguments(0),
		RunE: func(c *cobra.Command, _ []string) error {
			ordinal, err := cuda.Parse(device)
			if err != nil {
				return usageError{fmt.Errorf("--device: %w", err)}
			}
			if _, err := os.Lstat(output); err == nil && !force {
				return fmt.Errorf("%s exists; --force replaces it", output)
			}
			d, err := cuda.Open(ordinal)
			if err != nil {
				return err
			}
			var all []cuda.Timed
			table, err := d.Measure(c.Context(), func(t cuda.Timed) {
				all = append(all, t)
				if !asJSON {
					fmt.Fprintf(c.OutOrStdout(), "%6d×%-6d %5d rows  %9.2f µs  %v\n", t.N, t.K, t.Rows, float64(t.Time)/1e3, t.Way)
				}
			})
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(c, all); err != nil {
					return err
				}
			}
			text, err := json.MarshalIndent(table, "", " ")
			if err != nil {
				return err
			}
			// Under another name first, so that what is interrupted is not taken for finished.
			part := output + ".partial"
			if err := os.WriteFile(part, append(text, '\n'), 0o644); err != nil {
				return errors.Join(err, os.RemoveAll(part))
			}
			return os.Rename(part, output)
		},
	}
	c.Flags().StringVar(&device, "device", "cuda", "the device: cuda, cuda:1 …")
	c.Flags().StringVarP(&output, "output", "o", "tune.json", "the table's `file`")
	c.Flags().BoolVar(&force, "force", false, "replace an existing file")
	jsonFlag(c, &asJSON)
	return c
}
