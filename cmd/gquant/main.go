// Command gquant quantizes safetensors checkpoints, and checks, compares and restores quantized ones.
//
// Exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/gquant/gquant/core/kernel"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// version is set by the Makefile.
var version = "development"

const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

// usageError is a wrong command line.
type usageError struct{ error }

// failure is a command that ran and found something wrong, which it has already printed.
type failure struct{}

func (failure) Error() string { return "failed" }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := root().ExecuteContext(ctx)
	interrupted := ctx.Err() != nil
	stop()
	os.Exit(exitCode(err, interrupted))
}

// exitCode prints the error and gives the process's exit code.
func exitCode(err error, interrupted bool) int {
	var usage usageError
	switch {
	case err == nil:
		return 0
	case interrupted && errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "gquant: interrupted")
		return exitInterrupted
	case errors.As(err, &failure{}):
		return exitFailed
	}
	for _, line := range strings.Split(err.Error(), "\n") {
		fmt.Fprintln(os.Stderr, "gquant:", line)
	}
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

func root() *cobra.Command {
	c := &cobra.Command{
		Use:               "gquant",
		Short:             "Quantize safetensors checkpoints to bitsandbytes' 4-bit formats, exactly",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error { return kernel.Err() },
		Args:              cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q; gquant --help lists the commands", args[0])}
			}
			return c.Help()
		},
	}
	c.AddCommand(convertCommand(), planCommand(), inspectCommand(), verifyCommand(), diffCommand(), dequantizeCommand(), devicesCommand(), tuneCommand(), versionCommand())
	c.SetGlobalNormalizationFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "-", "_")) // --block-size is --block_size
	})
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	return c
}

// arguments wants exactly n paths.
func arguments(n int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(n)(c, args); err != nil {
			return usageError{fmt.Errorf("%w; usage: %s", err, c.UseLine())}
		}
		return nil
	}
}
