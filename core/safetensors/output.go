package safetensors

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// output is a file in the making. It is written as <path>.partial, which a lock protects from other writers of
// the same path, and gets its name when it is complete.
type output struct {
	path, partial string
	force         bool // may replace an existing file
	file          *os.File
	published     bool // it has its name

	storing sync.Mutex
	lost    error // why the data can never be made durable
}

// openOutput starts writing path. If a partial file of an earlier run is left over, keep decides whether to go on
// with it; with keep nil, or when it says no, the partial file is replaced by an empty one.
func openOutput(path string, force bool, keep func(left os.FileInfo) bool) (o *output, kept bool, err error) {
	if err := checkTarget(path, force); err != nil {
		return nil, false, err
	}
	o = &output{path: path, partial: path + ".partial", force: force}
	// Each turn either ends or has met a file that another process created or removed just then.
	for range 100 {
		o.file, err = os.OpenFile(o.partial, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		if err == nil {
			if ok, err := o.own(); err != nil {
				return nil, false, err
			} else if ok {
				return o, false, nil
			}
			continue
		}
		if !errors.Is(err, fs.ErrExist) {
			return nil, false, err
		}
		o.file, err = os.OpenFile(o.partial, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, false, fmt.Errorf("cannot use the file that an earlier run left: %w", err)
		}
		ok, err := o.own()
		if err != nil {
			return nil, false, err
		}
		if !ok {
			continue
		}
		if info, err := o.file.Stat(); err == nil && keep != nil && keep(info) {
			return o, true, nil
		}
		// A new file instead of a truncated one: the old one may have got its final name as a second link when
		// its writer was killed (see renameNew). It stays locked until it has no name.
		err = os.Remove(o.partial)
		o.file.Close()
		if err != nil {
			return nil, false, err
		}
	}
	return nil, false, fmt.Errorf("%s keeps changing: are many writers at work on it?", o.partial)
}

// own locks the open partial file and then checks that it still is the one with the name, and a regular file.
// It closes it unless it answers true.
func (o *output) own() (ok bool, err error) {
	defer func() {
		if !ok {
			o.file.Close()
		}
	}()
	if err := lockFile(o.file); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return false, fmt.Errorf("%s is being written by another process or job: %w", o.path, err)
		}
		return false, fmt.Errorf("locking %s: %w", o.partial, err)
	}
	mine, err := o.file.Stat()
	if err != nil {
		return false, err
	}
	named, err := os.Lstat(o.partial)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !named.Mode().IsRegular() {
		return false, fmt.Errorf("%s is in the way: it is not a regular file", o.partial)
	}
	return os.SameFile(mine, named), nil
}

// checkTarget says whether a file may be written at path.
func checkTarget(path string, force bool) error {
	if path == "" {
		return errors.New("the output has no file name")
	}
	folder := filepath.Dir(path)
	switch info, err := os.Stat(folder); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cannot write %s: the folder %s does not exist: %w", path, folder, fs.ErrNotExist)
	case err != nil:
		return fmt.Errorf("cannot write %s: %w", path, err)
	case !info.IsDir():
		return fmt.Errorf("cannot write %s: %s is not a folder", path, folder)
	}
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	// What a link leads to counts: /dev/stdout is one. A link without an end is as good as a file.
	switch info, err := os.Stat(path); {
	case err == nil && info.IsDir():
		return fmt.Errorf("cannot write %s: it is a directory", path)
	case err == nil && !info.Mode().IsRegular():
		return fmt.Errorf("cannot write %s: it is a %s", path, fileKind(info.Mode()))
	case !force:
		return fmt.Errorf("%s: %w; it is replaced only on request", path, fs.ErrExist)
	}
	return nil
}

// store makes durable what was written until now. Its first error is its last word: the kernel reports a failed
// write once, drops the data, and calls the next sync a success.
func (o *output) store() error {
	o.storing.Lock()
	defer o.storing.Unlock()
	if o.lost == nil {
		o.lost = syncData(o.file)
	}
	return o.lost
}

// publish makes the file durable, gives it its name, makes that durable too, and closes the file.
func (o *output) publish() error {
	if err := o.store(); err != nil {
		return err
	}
	rename := renameNew
	if o.force {
		rename = os.Rename
	}
	if err := rename(o.partial, o.path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w; it appeared meanwhile and is replaced only on request", fs.ErrExist)
		}
		return err
	}
	o.published = true
	return errors.Join(o.file.Close(), syncFolder(filepath.Dir(o.path)))
}

// discard removes the partial file; a published file stays.
func (o *output) discard() error {
	if o.published {
		return nil
	}
	err := os.Remove(o.partial) // before the lock goes
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	o.file.Close()
	return err
}

// linkNew gives a file a new name, which must be free, where the system has no call for that.
func linkNew(from, to string) error {
	err := os.Link(from, to)
	switch {
	case err == nil:
		return os.Remove(from)
	case errors.Is(err, fs.ErrExist):
		return err
	}
	// No hard links here (FAT, some network drives). Another program can still win the moment between the two
	// calls.
	if _, err := os.Lstat(to); err == nil {
		return fs.ErrExist
	}
	return os.Rename(from, to)
}
