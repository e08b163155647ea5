package safetensors

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"
)

// journal records which work items of a job are done, in <path>.partial.journal:
//
//	gquant-journal 1 <size of the file> <SHA-256 of its header> "<the job's key>"
//	17
//	3
//
// The first line ties it to one job and one layout; then comes one item number per line, in the order of
// completion. A line is written only after the data of its item are durable, so after a crash the journal never
// claims data that are not there. The last line may be torn.
type journal struct {
	out  *output  // what the items were written to
	file *os.File // nil: the job cannot be resumed, items are kept in memory only

	mu      sync.Mutex
	done    map[int]struct{}
	pending []int // done, but not in the file yet
	last    time.Time

	flushing sync.Mutex // held while file is written; guards size
	size     int64      // of the good lines in file
}

// journalPause is the time between two writes of the journal. Each of them waits for the disk to store all data
// written until then; a second bounds the cost for the job and the work lost in a crash.
const journalPause = time.Second

func journalHead(size int64, header []byte, key string) []byte {
	return fmt.Appendf(nil, "gquant-journal 1 %d %x %q\n", size, sha256.Sum256(header), key)
}

// readJournal returns the items of a journal that starts with head, and the size of its good lines. It reports
// fs.ErrNotExist if there is no such journal or it belongs to another job.
func readJournal(path string, head []byte) (items []int, size int64, err error) {
	f, _, err := openRegular(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, 0, err
	}
	rest, ok := bytes.CutPrefix(b, head)
	if !ok {
		return nil, 0, fs.ErrNotExist
	}
	size = int64(len(head))
	for {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		item, err := strconv.Atoi(string(line))
		if !whole || err != nil || item < 0 {
			return items, size, nil // the torn end
		}
		items = append(items, item)
		size += int64(len(line)) + 1
		rest = after
	}
}

// start opens the journal file and writes its good part: head and, when a job is resumed, the items known.
func (j *journal) start(path string, head []byte, resumed bool) error {
	flags := os.O_RDWR
	if !resumed {
		flags |= os.O_CREATE | os.O_EXCL
		j.size = int64(len(head))
	}
	f, err := os.OpenFile(path, flags, 0o666)
	if err != nil {
		return err
	}
	if !resumed {
		_, err = f.WriteAt(head, 0)
	}
	// A torn end must go before the next line is put behind it.
	err = errors.Join(err, f.Truncate(j.size), f.Sync())
	if err != nil {
		f.Close()
		return err
	}
	j.file, j.last = f, time.Now()
	return nil
}

// mark records an item whose data have been written, and from time to time writes the journal.
func (j *journal) mark(item int) error {
	j.mu.Lock()
	if _, known := j.done[item]; known {
		j.mu.Unlock()
		return nil
	}
	j.done[item] = struct{}{}
	if j.file == nil {
		j.mu.Unlock()
		return nil
	}
	j.pending = append(j.pending, item)
	due := time.Since(j.last) >= journalPause
	j.mu.Unlock()
	// One goroutine waits for the disk; the others go on, and their items are in the next round.
	if !due || !j.flushing.TryLock() {
		return nil
	}
	defer j.flushing.Unlock()
	return j.write()
}

func (j *journal) has(item int) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	_, ok := j.done[item]
	return ok
}

// flush writes all pending items now.
func (j *journal) flush() error {
	j.flushing.Lock()
	defer j.flushing.Unlock()
	return j.write()
}

// write makes the data of the pending items durable and then their lines. The caller holds flushing.
func (j *journal) write() error {
	j.mu.Lock()
	items := j.pending
	j.pending = nil
	j.mu.Unlock()
	if len(items) == 0 {
		return nil
	}
	err := j.out.store()
	if err == nil {
		var lines []byte
		for _, item := range items {
			lines = append(strconv.AppendInt(lines, int64(item), 10), '\n')
		}
		// At a known offset: after a failure the next try overwrites what this one left.
		if _, err = j.file.WriteAt(lines, j.size); err == nil {
			if err = syncData(j.file); err == nil {
				j.size += int64(len(lines))
			}
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last = time.Now()
	if err != nil {
		j.pending = append(items, j.pending...)
		return fmt.Errorf("writing the resume journal: %w", err)
	}
	return nil
}
