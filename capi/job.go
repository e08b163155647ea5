package main

// #include <stdlib.h>
// #include "types.h"
import "C"

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/convert"
	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/verify"
	"github.com/gquant/gquant/cuda"
)

// job is what a gq_job stands for: work under way on goroutines of the library.
type job struct {
	cancel context.CancelFunc
	done   chan struct{} // closed at the end; the fields below it are then final

	bytes, total atomic.Uint64
	result       *C.char // JSON, in C memory; nil if the job failed
	err          error
}

var jobs = newRegistry[*job]("job", 3)

// start reads a request into *into and runs the job.
func start(function string, request *C.gq_const_char, handle **C.gq_job, into any, run func(ctx context.Context, j *job) (any, error)) C.gq_status {
	return guarded(function, func() error {
		if handle == nil {
			return invalid("job is NULL")
		}
		*handle = nil
		text, err := text("request", request)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(strings.TrimSpace(text), "{") || !json.Valid([]byte(text)) {
			return invalid("request is not a JSON object: %.100q", text)
		}
		d := json.NewDecoder(strings.NewReader(text))
		d.DisallowUnknownFields()
		if err := d.Decode(into); err != nil {
			return invalid("request: %v", err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		j := &job{cancel: cancel, done: make(chan struct{})}
		go j.run(function, ctx, run)
		*handle = jobHandle(jobs.add(j))
		return nil
	})
}

func (j *job) run(function string, ctx context.Context, run func(ctx context.Context, j *job) (any, error)) {
	defer close(j.done)
	defer func() {
		if p := recover(); p != nil {
			poisoned.Store(true)
			j.err = failure{C.GQ_ERROR_INTERNAL, fmt.Errorf("defect of the library, please report it: %v\n%s", p, debug.Stack())}
		}
	}()
	result, err := run(ctx, j)
	if err != nil {
		j.err = fmt.Errorf("%s: %w", function, err)
	}
	if result == nil {
		return
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(result); err != nil {
		j.err = err
		return
	}
	j.result = C.CString(strings.TrimSuffix(b.String(), "\n"))
}

// convertRequest are the fields of gq_convert and gq_dequantize_model: those of the command line.
type convertRequest struct {
	Source string `json:"source"`
	DType  string `json:"dtype"` // gq_dequantize_model: "f32", "f16", "bf16", or "" for what each weight was
	convert.Options
}

// engine is the engine of the device that the request names.
func (r *convertRequest) engine() (quant.Engine, error) {
	if r.Device == "" || r.Device == "cpu" {
		return quant.CPU{}, nil
	}
	ordinal, err := cuda.Parse(r.Device)
	if err != nil {
		return nil, failure{C.GQ_ERROR_INVALID_ARGUMENT, err}
	}
	return cuda.NewEngine(ordinal)
}

// run carries out a plan of an opened model.
func (r *convertRequest) run(ctx context.Context, j *job, plan func(m *checkpoint.Model) (*convert.Plan, error)) (any, error) {
	engine, err := r.engine()
	if err != nil {
		return nil, err
	}
	m, err := checkpoint.Open(r.Source)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	p, err := plan(m)
	if err != nil {
		return nil, err
	}
	j.total.Store(uint64(p.Bytes))
	report, err := convert.Run(ctx, p, engine, func(n int64) { j.bytes.Add(uint64(n)) })
	if err != nil {
		return nil, err
	}
	return report, nil
}

//export go_gq_convert
func go_gq_convert(request *C.gq_const_char, handle **C.gq_job) C.gq_status {
	r := &convertRequest{Options: convert.DefaultOptions()}
	return start("gq_convert", request, handle, r, func(ctx context.Context, j *job) (any, error) {
		return r.run(ctx, j, func(m *checkpoint.Model) (*convert.Plan, error) { return convert.New(m, r.Options) })
	})
}

//export go_gq_dequantize_model
func go_gq_dequantize_model(request *C.gq_const_char, handle **C.gq_job) C.gq_status {
	r := &convertRequest{Options: convert.DefaultOptions()}
	return start("gq_dequantize_model", request, handle, r, func(ctx context.Context, j *job) (any, error) {
		d, ok := map[string]dtype.DType{"": 0, "f32": dtype.F32, "f16": dtype.F16, "bf16": dtype.BF16}[r.DType]
		if !ok {
			return nil, invalid("dtype %q is not one of f32, f16, bf16", r.DType)
		}
		return r.run(ctx, j, func(m *checkpoint.Model) (*convert.Plan, error) { return convert.NewDequantize(m, d, r.Options) })
	})
}

//export go_gq_verify
func go_gq_verify(request *C.gq_const_char, handle **C.gq_job) C.gq_status {
	r := &struct {
		Source string `json:"source"`
		verify.Options
	}{}
	return start("gq_verify", request, handle, r, func(ctx context.Context, _ *job) (any, error) {
		result, err := verify.Run(ctx, r.Source, r.Options)
		if err != nil {
			return nil, err
		}
		if n := len(result.Problems); n > 0 {
			return result, failure{C.GQ_ERROR_FAILED, fmt.Errorf("%d problem(s); the first: %s", n, result.Problems[0])}
		}
		return result, nil
	})
}

//export go_gq_diff
func go_gq_diff(request *C.gq_const_char, handle **C.gq_job) C.gq_status {
	r := &struct {
		A       string `json:"a"`
		B       string `json:"b"`
		Threads int    `json:"threads"`
	}{}
	return start("gq_diff", request, handle, r, func(ctx context.Context, _ *job) (any, error) {
		c, err := verify.Diff(ctx, r.A, r.B, r.Threads)
		if err != nil {
			return nil, err
		}
		return c, nil
	})
}

//export go_gq_inspect
func go_gq_inspect(request *C.gq_const_char, handle **C.gq_job) C.gq_status {
	r := &struct {
		Source string `json:"source"`
	}{}
	return start("gq_inspect", request, handle, r, func(context.Context, *job) (any, error) {
		m, err := checkpoint.Open(r.Source)
		if err != nil {
			return nil, err
		}
		defer m.Close()
		return m.Inspect(), nil
	})
}

// withJob runs an export on a job.
func withJob(function string, handle *C.gq_job, run func(j *job) error) C.gq_status {
	return guarded(function, func() error {
		j, done, err := jobs.use(jobNumber(handle))
		if err != nil {
			return err
		}
		defer done()
		return run(j)
	})
}

func (j *job) finished() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

//export go_gq_job_poll
func go_gq_job_poll(handle *C.gq_job, progress *C.gq_job_progress) C.gq_status {
	return withJob("gq_job_poll", handle, func(j *job) error {
		p := C.gq_job_progress{done_bytes: C.uint64_t(j.bytes.Load()), total_bytes: C.uint64_t(j.total.Load())}
		if j.finished() {
			p.finished = 1
		}
		return fill("progress", progress, &p)
	})
}

//export go_gq_job_cancel
func go_gq_job_cancel(handle *C.gq_job) C.gq_status {
	return withJob("gq_job_cancel", handle, func(j *job) error {
		j.cancel()
		return nil
	})
}

//export go_gq_job_wait
func go_gq_job_wait(handle *C.gq_job, timeout C.int64_t, finished *C.int32_t) C.gq_status {
	return withJob("gq_job_wait", handle, func(j *job) error {
		if finished == nil {
			return invalid("finished is NULL")
		}
		*finished = 0
		if timeout < -1 {
			return invalid("timeout_ms is %d; want -1 (for ever) or more", int64(timeout))
		}
		var expired <-chan time.Time
		if timeout >= 0 {
			expired = time.After(time.Duration(min(int64(timeout), 1<<40)) * time.Millisecond)
		}
		select {
		case <-j.done:
		case <-expired:
			if !j.finished() {
				return nil
			}
		}
		*finished = 1
		if j.err != nil {
			return failure{statusOf(j.err, C.GQ_ERROR_FAILED), j.err}
		}
		return nil
	})
}

//export go_gq_job_result
func go_gq_job_result(handle *C.gq_job, out **C.gq_const_char) C.gq_status {
	return withJob("gq_job_result", handle, func(j *job) error {
		if out == nil {
			return invalid("json is NULL")
		}
		*out = (*C.gq_const_char)(unsafe.Pointer(empty))
		if j.finished() && j.result != nil {
			*out = (*C.gq_const_char)(unsafe.Pointer(j.result))
		}
		return nil
	})
}

var empty = C.CString("")

//export go_gq_job_free
func go_gq_job_free(handle *C.gq_job) C.gq_status {
	return guarded("gq_job_free", func() error {
		if handle == nil {
			return nil
		}
		// Calls that wait for the job end with it, so it is stopped before they are waited for.
		j, done, err := jobs.use(jobNumber(handle))
		if err != nil {
			return err
		}
		j.cancel()
		done()
		if j, err = jobs.remove(jobNumber(handle)); err != nil {
			return err
		}
		<-j.done
		C.free(unsafe.Pointer(j.result))
		return nil
	})
}
