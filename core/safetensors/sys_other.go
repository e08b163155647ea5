//go:build !linux

package safetensors

import "os"

// lockFile does not lock: two writers of one path are not noticed here.
func lockFile(*os.File) error { return nil }

// preallocate sets the size; a full disk shows only when the data arrive.
func preallocate(f *os.File, size int64) error { return f.Truncate(size) }

// startWriteback does nothing: the system stores data when it likes.
func startWriteback(*os.File, int64, int64) {}

// syncData makes what was written to f durable.
func syncData(f *os.File) error { return f.Sync() }

// syncFolder does nothing: not every system can open a folder to sync it.
func syncFolder(string) error { return nil }

// renameNew gives a file a new name, which must be free.
func renameNew(from, to string) error { return linkNew(from, to) }
