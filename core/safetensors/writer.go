package safetensors

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// writebackSize is the size of a write from which on its storing begins at once. Without that the kernel sits on
// the data until Commit, which then waited 0.7 to 1.1 s for the last of 3 GiB on a fast disk, and 2 ms with it;
// the writes took no longer. Below a megabyte the calls would cost more than they give.
const writebackSize = 1 << 20

// CreateOptions are the choices in Create.
type CreateOptions struct {
	// Force replaces an existing file of that name, at Commit.
	Force bool
	// Resume, if not "", identifies the job: what it reads, what it does with it, and how it is cut into work
	// items. A partial file that a job with the same key left is continued; another one is replaced. Equal keys
	// must mean equal data.
	Resume string
}

// Writer writes one file, from any number of goroutines and in any order. Until Commit the data are in
// <path>.partial; nothing is ever visible under the final name but the complete file. Each Writer ends with
// Commit or Abort.
type Writer struct {
	out         *output
	specs       []Spec
	tensors     []Tensor
	metadata    map[string]string
	dataStart   int64
	size        int64
	journal     *journal
	journalPath string

	end   sync.Mutex // held by Commit and Abort
	ended bool
}

// Create starts a file with these tensors. It checks everything that can be checked, writes the header and
// reserves the space of the whole file, so that WriteAt hardly can fail later. It fails if path exists (without
// Force) or cannot be a file, if its folder does not exist, if the space does not suffice, and if another Writer,
// of this process or another one, is at work on the same path.
func Create(path string, specs []Spec, metadata map[string]string, o CreateOptions) (*Writer, error) {
	header, tensors, err := Layout(specs, metadata)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	w := &Writer{specs: specs, tensors: tensors, metadata: metadata, dataStart: int64(len(header)), size: int64(len(header))}
	for i := range tensors {
		w.size = max(w.size, w.dataStart+tensors[i].End)
	}
	head := journalHead(w.size, header, o.Resume)
	w.journal = &journal{done: map[int]struct{}{}}
	w.journalPath = path + ".partial.journal"

	var kept bool
	w.out, kept, err = openOutput(path, o.Force, func(left os.FileInfo) bool {
		if o.Resume == "" || left.Size() != w.size {
			return false
		}
		items, size, err := readJournal(w.journalPath, head)
		if err != nil {
			return false
		}
		for _, item := range items {
			w.journal.done[item] = struct{}{}
		}
		w.journal.size = size
		return true
	})
	if err != nil {
		return nil, err
	}
	w.journal.out = w.out
	if err := w.prepare(header, head, kept, o.Resume != ""); err != nil {
		if kept {
			w.close() // what an earlier run did is worth another try
		} else {
			w.remove()
		}
		return nil, fmt.Errorf("cannot write %s: %w", path, err)
	}
	return w, nil
}

// prepare brings the partial file and its journal to the state in which work can begin.
func (w *Writer) prepare(header, head []byte, kept, resumable bool) error {
	if !kept {
		// A journal that an earlier job left must be gone for good before the file has its full size: after a
		// crash it could be taken for this file's.
		if err := os.Remove(w.journalPath); err == nil {
			if err := syncFolder(filepath.Dir(w.journalPath)); err != nil {
				return err
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := preallocate(w.out.file, w.size); err != nil {
			return err
		}
	}
	// A kept file gets its header again: only data that the journal names are known to be durable.
	if _, err := w.out.file.WriteAt(header, 0); err != nil {
		return err
	}
	if !resumable {
		return nil
	}
	if err := w.journal.start(w.journalPath, head, kept); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(w.journalPath))
}

// Path is the file's final name.
func (w *Writer) Path() string { return w.out.path }

// Size is the size of the whole file in bytes; before Commit with every late tensor at its greatest length.
func (w *Writer) Size() int64 { return w.size }

// Tensors lists the tensors in the order of the specs; before Commit with every late tensor at its greatest length.
func (w *Writer) Tensors() []Tensor { return w.tensors }

// WriteAt writes p to the tensor of specs[i], from its byte off on. A range outside the tensor is an error.
// p is not kept.
func (w *Writer) WriteAt(i int, p []byte, off int64) error {
	if i < 0 || i >= len(w.tensors) {
		return fmt.Errorf("%s: there is no tensor %d, only %d tensors", w.out.path, i, len(w.tensors))
	}
	t := &w.tensors[i]
	if off < 0 || off > t.Bytes() || int64(len(p)) > t.Bytes()-off {
		return fmt.Errorf("%s: tensor %s: cannot write %d bytes at %d, it has %d", w.out.path, quote(t.Name), len(p), off, t.Bytes())
	}
	at := w.dataStart + t.Begin + off
	if _, err := w.out.file.WriteAt(p, at); err != nil {
		return fmt.Errorf("tensor %s: writing %d bytes at %d: %w", quote(t.Name), len(p), off, err)
	}
	if len(p) >= writebackSize {
		startWriteback(w.out.file, at, int64(len(p)))
	}
	return nil
}

// MarkDone records that all data of a work item have been written: every WriteAt of the item has returned. Items
// are numbers from 0 on whose meaning is the caller's. With a Resume key they outlive the process, after a delay
// of about a second; without one MarkDone serves Done only.
func (w *Writer) MarkDone(item int) error {
	if item < 0 {
		return fmt.Errorf("%s: work item %d, expected 0 or more", w.out.path, item)
	}
	return w.journal.mark(item)
}

// Done says whether an item is finished: in this run, or in an earlier one that this one resumes.
func (w *Writer) Done(item int) bool { return w.journal.has(item) }

// Commit makes the file durable and gives it its name. No WriteAt may be under way. After an error Abort is still
// to be called; it leaves the file alone if only a last step failed, after the file had got its name.
func (w *Writer) Commit() error {
	w.end.Lock()
	defer w.end.Unlock()
	if w.ended {
		return fmt.Errorf("%s: the writer has ended already", w.out.path)
	}
	if err := w.settle(); err != nil {
		return fmt.Errorf("finishing %s: %w", w.out.path, err)
	}
	if err := w.out.publish(); err != nil {
		return fmt.Errorf("finishing %s: %w", w.out.path, err)
	}
	w.ended = true
	if w.journal.file == nil {
		return nil
	}
	w.journal.file.Close()
	if err := os.Remove(w.journalPath); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Abort ends the writing without a result. It keeps the partial file and its journal if keep is set and there is
// a Resume key, and removes them otherwise. WriteAt calls that are under way finish or fail. After Commit or
// Abort it does nothing, so it can be deferred.
func (w *Writer) Abort(keep bool) error {
	w.end.Lock()
	defer w.end.Unlock()
	if w.ended {
		return nil
	}
	w.ended = true
	if !keep || w.journal.file == nil {
		return w.remove()
	}
	err := w.journal.flush()
	w.close()
	return err
}

// remove deletes the partial file and its journal.
func (w *Writer) remove() error {
	err := os.Remove(w.journalPath) // first: it must not outlive what it is about
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if w.journal.file != nil {
		w.journal.file.Close()
	}
	return errors.Join(err, w.out.discard())
}

// close closes the files and leaves them where they are.
func (w *Writer) close() {
	if w.journal.file != nil {
		w.journal.file.Close()
	}
	w.out.file.Close()
}
