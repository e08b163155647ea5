package quant

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// chunkElements is how many elements a thread works on at a time: a few hundred KiB, so that source and
// result stay in the core's own cache; whole blocks of every 4-bit blocksize.
const chunkElements = 128 << 10

// wholeBlocks is the number of elements of a chunk of whole blocks: chunkElements, or one block if that is more.
func wholeBlocks(blocksize int) int64 {
	return max(1, chunkElements/int64(blocksize)) * int64(blocksize)
}

// parallel calls work for pieces of at most size of the range [0, n), from several goroutines (threads; 0 = one per
// core). Each piece but the last has the full size.
func parallel(n, size int64, threads int, work func(first, count int64)) {
	pieces := (n + size - 1) / size
	if threads <= 0 {
		threads = runtime.GOMAXPROCS(0)
	}
	var next atomic.Int64
	run := func() {
		for {
			first := (next.Add(1) - 1) * size
			if first >= n {
				return
			}
			work(first, min(size, n-first))
		}
	}
	var others sync.WaitGroup
	for range min(int64(threads), pieces) - 1 {
		others.Go(run)
	}
	run()
	others.Wait()
}
