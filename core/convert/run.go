package convert

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gquant/gquant/core/quant"
	"github.com/gquant/gquant/core/safetensors"
	"golang.org/x/sync/errgroup"
)

// stage carries out one item, chunk by chunk. Chunks may run at the same time and in any order; open runs once,
// before the first of them, and finish once, after the last. What a stage holds for its item it takes in open and
// drops in finish, so that only the few items under way have memory.
type stage interface {
	chunks() int // at least 1
	open() error
	run(chunk int, scratch *scratch) error
	finish() error
}

// scratch is what one goroutine works with: its hold on the engine, and memory.
type scratch struct {
	worker        quant.Worker
	codes, values []byte // of the stage that dequantizes
}

// job is an item on its way.
type job struct {
	item   *Item
	number int // of the item in the plan
	stage  stage
	open   func() error // the stage's open, once
	left   atomic.Int64 // chunks not done
}

// task is one chunk of a job: what a worker takes.
type task struct {
	job   *job
	chunk int
}

// Run carries out the plan, quantizing with the engine. It calls progress, from several goroutines, with the number of source bytes
// that each finished chunk covered. When ctx ends it stops with ctx's error.
// On any error no file has its final name; with Options.Resume an interrupted result stays for the next run.
func Run(ctx context.Context, p *Plan, engine quant.Engine, progress func(bytes int64)) (report *Report, err error) {
	start := time.Now()
	key, err := p.key()
	if err != nil {
		return nil, err
	}
	out := &outputs{}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.abort(p.Options.Resume && ctx.Err() != nil))
		}
	}()
	for _, s := range p.Shards {
		o := safetensors.CreateOptions{Force: p.Options.Force}
		if p.Options.Resume {
			o.Resume = key
		}
		w, err := safetensors.Create(s.Path, s.specs, s.metadata, o)
		if err != nil {
			return nil, err
		}
		out.writers = append(out.writers, w)
	}

	report = p.newReport()
	var tasks []task
	for number, it := range p.Items {
		w := out.writers[it.Shard]
		if w.Done(number) {
			report.Resumed++
			progress(it.Bytes)
			continue
		}
		j := &job{item: it, number: number}
		switch it.Action {
		case Copy:
			j.stage = newCopier(it, w, engine.ChunkBytes())
		case Quantize:
			j.stage = newQuantizer(it, w, engine.ChunkBytes())
		case Dequantize:
			j.stage = newDequantizer(it, w, engine.ChunkBytes())
		}
		j.open = sync.OnceValue(j.stage.open)
		j.left.Store(int64(j.stage.chunks()))
		for chunk := range j.stage.chunks() {
			tasks = append(tasks, task{j, chunk})
		}
	}
	if err := runTasks(ctx, tasks, engine, p.Options.Threads, func(j *job) error {
		if err := j.stage.finish(); err != nil {
			return err
		}
		if q, ok := j.stage.(*quantizer); ok {
			if err := report.count(q, p.Options.Strict); err != nil {
				return err
			}
		}
		return out.writers[j.item.Shard].MarkDone(j.number)
	}, progress); err != nil {
		return nil, err
	}
	if err := out.commit(p); err != nil {
		return nil, err
	}
	return report, report.measure(p, out.writers, time.Since(start))
}

// runTasks hands out the chunks in file order to the engine's workers.
func runTasks(ctx context.Context, tasks []task, engine quant.Engine, threads int, finished func(*job) error, progress func(int64)) error {
	var next atomic.Int64
	var finishing sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	for range min(engine.Workers(threads), len(tasks)) {
		group.Go(func() (err error) {
			worker, err := engine.NewWorker()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, worker.Close()) }()
			memory := scratch{worker: worker}
			for {
				if err := ctx.Err(); err != nil {
					return err
				}
				n := next.Add(1) - 1
				if n >= int64(len(tasks)) {
					return nil
				}
				j, chunk := tasks[n].job, tasks[n].chunk
				if err := j.open(); err != nil {
					return err
				}
				if err := j.stage.run(chunk, &memory); err != nil {
					return err
				}
				// Spread the item's bytes evenly over its chunks; the shares add up exactly.
				count := int64(j.stage.chunks())
				progress(j.item.Bytes*int64(chunk+1)/count - j.item.Bytes*int64(chunk)/count)
				if j.left.Add(-1) > 0 {
					continue
				}
				finishing.Lock()
				err := finished(j)
				finishing.Unlock()
				if err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}

// outputs are the files being written.
type outputs struct {
	writers   []*safetensors.Writer
	committed int
}

// commit gives every file its final content and name, the index last: without it no reader sees a sharded model.
func (o *outputs) commit(p *Plan) error {
	weightMap, total := map[string]string{}, int64(0)
	for i, w := range o.writers {
		metadata, err := p.finalMetadata(i, w)
		if err != nil {
			return err
		}
		w.SetMetadata(metadata)
		if err := w.Commit(); err != nil {
			return err
		}
		o.committed = i + 1
		for _, t := range w.Tensors() {
			weightMap[t.Name] = filepath.Base(p.Shards[i].Path)
			total += t.Bytes()
		}
	}
	if p.Index == "" {
		return nil
	}
	return safetensors.WriteIndex(p.Index, weightMap, total, p.Options.Force)
}

// abort removes what is unfinished (or keeps it for --resume), and shards that already have their final names:
// without an index they are no model.
func (o *outputs) abort(keep bool) error {
	var problems []error
	for i, w := range o.writers {
		if i < o.committed {
			problems = append(problems, os.Remove(w.Path()))
		} else {
			problems = append(problems, w.Abort(keep))
		}
	}
	return errors.Join(problems...)
}

// key identifies the job for --resume: the same plan over sources of the same size and time.
func (p *Plan) key() (string, error) {
	h := sha256.New()
	for _, part := range []any{p.Items, p.Shards, p.Options.Mode, p.Options.BlockSize, p.Options.DoubleQuant} {
		if err := json.NewEncoder(h).Encode(part); err != nil {
			return "", err
		}
	}
	seen := map[string]bool{}
	for _, it := range p.Items {
		if seen[it.Source.File] {
			continue
		}
		seen[it.Source.File] = true
		info, err := os.Stat(it.Source.File)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, info.Size(), info.ModTime().UnixNano())
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
