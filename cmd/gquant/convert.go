package main

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/convert"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
)

// outputFlags are the flags of every command that writes a model.
func outputFlags(c *cobra.Command, o *convert.Options, shardSize *string) {
	f := c.Flags()
	f.StringVarP(&o.Output, "output", "o", "", "path of the result (default: beside the input)")
	f.StringVar(shardSize, "max_shard_size", "", "split the result into files of at most this size, such as 5GB")
	f.BoolVar(&o.Resume, "resume", false, "keep the unfinished result when interrupted, and continue one that is there")
	f.BoolVar(&o.Force, "force", false, "replace existing output")
	f.IntVar(&o.Threads, "threads", 0, "number of threads (default: all cores)")
}

// parseShardSize reads sizes such as 5GB, 500MiB or a number of bytes.
func parseShardSize(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n == 0 || n > 1<<62 {
		return 0, usageError{fmt.Errorf("--max_shard_size %q is not a size such as 5GB", text)}
	}
	return int64(n), nil
}

// convertFlags are shared by convert and plan.
type convertFlags struct {
	options   convert.Options
	shardSize string
	json      bool
}

func (f *convertFlags) register(c *cobra.Command) {
	f.options = convert.DefaultOptions()
	outputFlags(c, &f.options, &f.shardSize)
	o, flags := &f.options, c.Flags()
	flags.StringVar(&o.Mode, "mode", o.Mode, "format of the quantized weights: nf4 or fp4")
	flags.IntVar(&o.BlockSize, "block_size", o.BlockSize, "weights that share one absmax: 32, 64, 128, … 4096")
	flags.BoolVar(&o.DoubleQuant, "double_quant", o.DoubleQuant, "quantize absmax too (nested statistics)")
	flags.StringVar(&o.QuantStorage, "quant_storage", o.QuantStorage, "dtype the packed weights are stored as: uint8, int8, bf16, f16 or f32")
	flags.StringArrayVar(&o.Exclude, "exclude", nil, `tensors to leave as they are: globs such as "*.norm*,*.embed*"`)
	flags.StringArrayVar(&o.Include, "include", nil, "tensors to quantize although the default rule would leave them")
	flags.StringVar(&o.Convention, "convention", o.Convention, "bitsandbytes, or comfy to write .comfy_quant tensors as well")
	flags.StringVar(&o.Device, "device", o.Device, "where to quantize: cpu, or cuda:0, cuda:1, …; the bytes are the same")
	flags.BoolVar(&o.Strict, "strict", false, "fail when a weight holds NaN or Inf")
	jsonFlag(c, &f.json)
}

func convertCommand() *cobra.Command {
	var f convertFlags
	var dryRun bool
	c := &cobra.Command{
		Use:   "convert INPUT",
		Short: "Quantize a model: a .safetensors file, a shard index or a folder",
		Args:  arguments(1),
		RunE: func(c *cobra.Command, args []string) error {
			if dryRun {
				return f.plan(c, args[0])
			}
			return f.convert(c, args[0])
		},
	}
	f.register(c)
	c.Flags().BoolVar(&dryRun, "dry_run", false, "print the plan and write nothing")
	return c
}

func planCommand() *cobra.Command {
	var f convertFlags
	c := &cobra.Command{
		Use:   "plan INPUT",
		Short: "Show what convert would do with every tensor, and why",
		Args:  arguments(1),
		RunE:  func(c *cobra.Command, args []string) error { return f.plan(c, args[0]) },
	}
	f.register(c)
	return c
}

// open plans the conversion of a model, which the caller closes.
func (f *convertFlags) open(path string) (*checkpoint.Model, *convert.Plan, error) {
	var err error
	if f.options.MaxShardSize, err = parseShardSize(f.shardSize); err != nil {
		return nil, nil, err
	}
	if f.options.Threads < 0 {
		return nil, nil, usageError{fmt.Errorf("--threads %d is negative", f.options.Threads)}
	}
	m, err := checkpoint.Open(path)
	if err != nil {
		return nil, nil, err
	}
	p, err := convert.New(m, f.options)
	if err != nil {
		m.Close()
		return nil, nil, err
	}
	return m, p, nil
}

func (f *convertFlags) convert(c *cobra.Command, path string) error {
	m, p, err := f.open(path)
	if err != nil {
		return err
	}
	defer m.Close()
	return runPlan(c, p, f.json)
}

// runPlan carries out a plan and prints its report.
func runPlan(c *cobra.Command, p *convert.Plan, asJSON bool) error {
	for _, w := range p.Warnings {
		warn(c, "%s", w)
	}
	engine, err := engineOf(p.Options.Device)
	if err != nil {
		return err
	}
	add, done := progress("converting", p.Bytes)
	r, err := convert.Run(c.Context(), p, engine, add)
	done()
	if err != nil {
		return err
	}
	for _, n := range r.Nonfinite {
		warn(c, "tensor %q has %d elements that are NaN or Inf", n.Name, n.Count)
	}
	if asJSON {
		return printJSON(c, r)
	}
	w := c.OutOrStdout()
	changed, verb := r.Quantized, "quantized to "+p.Options.Mode
	if r.Dequantized > 0 {
		changed, verb = r.Dequantized, "dequantized"
	}
	fmt.Fprintf(w, "%s -> %s\n", p.Source, r.Outputs[len(r.Outputs)-1])
	fmt.Fprintf(w, "%d weights %s (%s -> %s, ratio %.2f), %d tensors copied\n",
		changed, verb, size(r.LayerBytes[0]), size(r.LayerBytes[1]), float64(r.LayerBytes[0])/float64(max(1, r.LayerBytes[1])), r.Copied)
	if r.Resumed > 0 {
		fmt.Fprintf(w, "%d of these were done by an earlier run\n", r.Resumed)
	}
	_, err = fmt.Fprintf(w, "whole model %s -> %s, ratio %.2f, in %.2f s (%s of input)\n",
		size(r.SourceBytes), size(r.OutputBytes), float64(r.SourceBytes)/float64(r.OutputBytes), r.Seconds, rate(r.SourceBytes, r.Seconds))
	return err
}

func (f *convertFlags) plan(c *cobra.Command, path string) error {
	m, p, err := f.open(path)
	if err != nil {
		return err
	}
	defer m.Close()
	for _, w := range p.Warnings {
		warn(c, "%s", w)
	}
	if f.json {
		return printJSON(c, p)
	}
	var rows []table.Row
	for _, it := range p.Items {
		becomes := it.DType
		if it.Format != "" {
			becomes = it.Format
		}
		rows = append(rows, table.Row{it.Name, it.DType, shapeText(it.Shape), it.Action, becomes, size(it.Bytes), size(it.OutputBytes()), it.Reason})
	}
	w := c.OutOrStdout()
	printTable(w, table.Row{"tensor", "dtype", "shape", "action", "becomes", "size", "new size", "reason"}, rows, "size", "new size")
	for _, s := range p.Shards {
		fmt.Fprintf(w, "%s: %s\n", s.Path, size(s.Bytes))
	}
	_, err = fmt.Fprintf(w, "%d to quantize, %d to copy; %s -> %s, ratio %.2f\n",
		p.Count(convert.Quantize), p.Count(convert.Copy), size(p.Bytes), size(p.OutputBytes), float64(p.Bytes)/float64(max(1, p.OutputBytes)))
	return err
}

func shapeText(shape []int64) string {
	text := ""
	for i, d := range shape {
		if i > 0 {
			text += "×"
		}
		text += fmt.Sprint(d)
	}
	return text
}
