package main

import (
	"fmt"

	"github.com/gquant/gquant/core/verify"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
)

func diffCommand() *cobra.Command {
	var byKind, asJSON bool
	var top, threads int
	c := &cobra.Command{
		Use:   "diff A B",
		Short: "Compare two models tensor by tensor; A is the reference",
		Args:  arguments(2),
		RunE: func(c *cobra.Command, args []string) error {
			cmp, err := verify.Diff(c.Context(), args[0], args[1], threads)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(c, cmp)
			}
			rows := cmp.Tensors
			if byKind {
				rows = cmp.Kinds
			}
			printDifferences(c, cmp, rows, top)
			return nil
		},
	}
	c.Flags().BoolVar(&byKind, "by_kind", false, "one line for all tensors whose names differ in numbers only")
	c.Flags().IntVar(&top, "top", 0, "print only the worst N lines")
	c.Flags().IntVar(&threads, "threads", 0, "number of threads (default: all cores)")
	jsonFlag(c, &asJSON)
	return c
}

func printDifferences(c *cobra.Command, cmp *verify.Comparison, differences []verify.Difference, top int) {
	w := c.OutOrStdout()
	var rows []table.Row
	for _, d := range differences {
		if d.Equal {

			continue
		}
		if top > 0 && len(rows) == top {
			continue
		}
		rows = append(rows, table.Row{d.Name, d.FormatA, d.FormatB, fmt.Sprintf("%.2f", d.SNR), fmt.Sprintf("%.6f", d.Cosine), fmt.Sprintf("%.3g", d.MaxError), fmt.Sprintf("%.3g", d.MeanError), fmt.Sprintf("%.3g", d.MSE)})
	}
	if len(rows) > 0 {
		printTable(w, table.Row{"tensor", "A", "B", "SNR dB", "cosine", "max error", "mean error", "MSE"}, rows, "SNR dB", "cosine", "max error", "mean error", "MSE")
	}
	for _, name := range cmp.OnlyA {
		fmt.Fprintf(w, "only in %s: %s\n", cmp.A, name)
	}
	for _, name := range cmp.OnlyB {
		fmt.Fprintf(w, "only in %s: %s\n", cmp.B, name)
	}
	for _, text := range cmp.Mismatch {
		fmt.Fprintf(w, "shapes differ: %s\n", text)
	}
	for _, name := range cmp.Skipped {
		fmt.Fprintf(w, "not compared, its dtype has no single numbers: %s\n", name)
	}
	changed, same := 0, 0
	for _, d := range cmp.Tensors {
		if d.Equal {
			same++
		} else {
			changed++
		}
	}
	if changed == 0 {
		fmt.Fprintf(w, "%d tensors, all equal\n", same)
		return
	}
	d := cmp.Changed
	fmt.Fprintf(w, "%d tensors differ, %d equal; where they differ: SNR %.2f dB, cosine %.6f, max error %.3g, MSE %.3g\n", changed, same, d.SNR, d.Cosine, d.MaxError, d.MSE)
}
