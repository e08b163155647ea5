package main

import (
	"fmt"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/convert"
	"github.com/gquant/gquant/core/dtype"
	"github.com/spf13/cobra"
)

// plainDTypes are the names of the dtypes that weights can be restored to.
var plainDTypes = map[string]dtype.DType{"": 0, "f32": dtype.F32, "f16": dtype.F16, "bf16": dtype.BF16}

func dequantizeCommand() *cobra.Command {
	var o convert.Options
	var name, shardSize string
	var asJSON bool
	c := &cobra.Command{
		Use:   "dequantize INPUT",
		Short: "Turn the quantized layers of a model back into plain weights",
		Args:  arguments(1),
		RunE: func(c *cobra.Command, args []string) error {
			d, ok := plainDTypes[name]
			if !ok {
				return usageError{fmt.Errorf("--dtype %q is not one of f32, f16, bf16", name)}
			}
			var err error
			if o.MaxShardSize, err = parseShardSize(shardSize); err != nil {
				return err
			}
			m, err := checkpoint.Open(args[0])
			if err != nil {
				return err
			}
			defer m.Close()
			p, err := convert.NewDequantize(m, d, o)
			if err != nil {
				return err
			}
			return runPlan(c, p, asJSON)
		},
	}
	outputFlags(c, &o, &shardSize)
	c.Flags().StringVar(&name, "dtype", "", "f32, f16 or bf16 (default: what each weight was quantized from)")
	jsonFlag(c, &asJSON)
	return c
}
