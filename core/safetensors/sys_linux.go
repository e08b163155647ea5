package safetensors

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// onFD makes a system call on f's descriptor, again when a signal interrupts it.
func onFD(f *os.File, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = conn.Control(func(fd uintptr) {
		for {
			if result = call(int(fd)); result != unix.EINTR {
				return
			}
		}
	})
	return errors.Join(err, result)
}

// lockFile locks f until it is closed, or fails with EWOULDBLOCK if someone else has it locked. File systems
// without locks let every writer in.
func lockFile(f *os.File) error {
	err := onFD(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.ENOLCK) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// preallocate reserves size bytes for f, so that a full disk shows before hours of work and not after them.
// File systems that cannot reserve only get the size set.
func preallocate(f *os.File, size int64) error {
	// A file beyond the limit would not only fail but raise SIGXFSZ, which ends most programs.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &limit); err == nil && uint64(size) > limit.Cur {
		return fmt.Errorf("the file needs %d bytes, but this process may write only %d to one file (ulimit -f): %w", size, limit.Cur, unix.EFBIG)
	}
	err := onFD(f, func(fd int) error { return unix.Fallocate(fd, 0, 0, size) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = f.Truncate(size)
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		var room unix.Statfs_t
		if onFD(f, func(fd int) error { return unix.Fstatfs(fd, &room) }) != nil {
			return fmt.Errorf("the disk has no room for %d bytes: %w", size, err)
		}
		return fmt.Errorf("the disk has no room for %d bytes, only about %d are free: %w", size, room.Bavail*uint64(room.Bsize), err)
	case errors.Is(err, unix.EFBIG):
		return fmt.Errorf("the file system allows no file of %d bytes: %w", size, err)
	}
	return err
}

// startWriteback tells the kernel to begin storing a range, and does not wait. Its errors are left for syncData,
// which sees them too.
func startWriteback(f *os.File, off, n int64) {
	_ = onFD(f, func(fd int) error { return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE) })
}

// syncData makes what was written to f durable.
func syncData(f *os.File) error { return onFD(f, unix.Fdatasync) }

// syncFolder makes the names in a folder durable. Some file systems cannot, and then need not.
func syncFolder(folder string) error {
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	return nil
}

// renameNew gives a file a new name, which must be free.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS || err == unix.EOPNOTSUPP { // NFS, FUSE, old kernels
		return linkNew(from, to)
	}
	return err
}
