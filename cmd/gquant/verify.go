package main

import (
	"fmt"
	"strings"

	"github.com/gquant/gquant/core/verify"
	"github.com/spf13/cobra"
)

func verifyCommand() *cobra.Command {
	var o verify.Options
	var asJSON bool
	c := &cobra.Command{
		Use:   "verify MODEL",
		Short: "Check a model's structure, its quantized layers and its numbers",
		Args:  arguments(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := verify.Run(c.Context(), args[0], o)
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(c, r); err != nil {
					return err
				}
			} else {
				printVerified(c, r)
			}
			if len(r.Problems) > 0 {
				return failure{}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&o.SHA256, "sha256", false, "hash every file")
	c.Flags().BoolVar(&o.Strict, "strict", false, "fail when a tensor holds NaN, Inf or only zeros")
	c.Flags().IntVar(&o.Threads, "threads", 0, "number of threads (default: all cores)")
	jsonFlag(c, &asJSON)
	return c
}

func printVerified(c *cobra.Command, r *verify.Result) {
	w := c.OutOrStdout()
	for _, f := range r.Files {
		if f.SHA256 != "" {
			fmt.Fprintf(w, "%s  %s\n", f.SHA256, f.Path)
		}
	}
	for _, s := range r.Suspects {
		warn(c, "tensor %q: %s", s.Name, s.String())
	}
	for _, p := range r.Problems {
		fmt.Fprintln(c.ErrOrStderr(), "gquant:", p)
	}
	if len(r.Files) == 0 { // it could not even be opened, and the problem says so
		return
	}
	layers := fmt.Sprintf("%d quantized layers", r.Layers)
	if len(r.Formats) > 0 {
		layers += " (" + strings.Join(r.Formats, ", ") + ")"
	}
	verdict := "ok"
	if len(r.Problems) > 0 {
		verdict = fmt.Sprintf("%d problem(s)", len(r.Problems))
	}
	fmt.Fprintf(w, "%s: %d tensors, %s: %s\n", r.Path, r.Tensors, layers, verdict)
}
