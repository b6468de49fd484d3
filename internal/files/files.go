// SPDX-License-Identifier: GPL-3.0-or-later

// Package files keeps state in files: it replaces them so that they are old or new at any time,
// locks them, and reads them without trust in whoever may write to the directory. The program often
// runs as root, in directories where others may have put symbolic links, pipes or files of their
// own.
package files

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// TemporaryPrefix begins the names of temporary files, those that [Replace] makes for example. A
// process that is killed leaves them behind.
const TemporaryPrefix = ".new-"

// TemporaryName returns the name of a temporary file in a directory that no other file has, and of
// which [RemoveAbandoned] knows what it is.
func TemporaryName(directory string) string {
	return filepath.Join(directory, TemporaryPrefix+rand.Text())
}

// ErrLocked is wrapped by errors that say that another process, or another open file of this one,
// has the lock.
var ErrLocked = errors.New("in use by another process")

// ErrSpecial is wrapped by errors that say that something is not a regular file.
var ErrSpecial = errors.New("it is not a regular file")

// Options says how [Replace] writes. The zero value is for state that may be lost in a power
// failure.
type Options struct {
	Sync   bool // the file and its name are on disk when Replace returns
	New    bool // fail with [fs.ErrExist] if the file exists
	Locked bool // the caller has a lock against other writers: at most one temporary file is left behind, and used again
}

// Replace writes a file with the mode (less the umask), so that others find the old file or the
// whole new one, also after the process has been killed; with [Options.Sync] also after a power
// failure. A symbolic link at path is replaced and never followed. The directory must exist. If
// write or anything else fails the old file stays, and nothing is left behind. The writer is
// buffered. It is safe for concurrent use, but with [Options.Locked].
func Replace(path string, mode fs.FileMode, o Options, write func(w io.Writer) error) error {
	return replace(path, mode, o, func(f *os.File) error {
		w := bufio.NewWriterSize(f, 64<<10)
		if err := write(w); err != nil {
			return err
		}
		return w.Flush()
	})
}

// Write is [Replace] with what the file is to have.
func Write(path string, mode fs.FileMode, o Options, contents []byte) error {
	return replace(path, mode, o, func(f *os.File) error {
		_, err := f.Write(contents)
		return err
	})
}

func replace(path string, mode fs.FileMode, o Options, write func(f *os.File) error) (err error) {
	directory, name := filepath.Split(path)
	f, err := temporary(directory, name, mode, o.Locked)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	err = write(f)
	if err == nil && o.Sync {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if o.New {
		err = MoveNew(f.Name(), path)
	} else {
		err = os.Rename(f.Name(), path)
	}
	if err != nil || !o.Sync {
		return err
	}
	return SyncDirectory(filepath.Dir(path))
}

// temporary makes the file that is filled.
func temporary(directory, name string, mode fs.FileMode, locked bool) (*os.File, error) {
	temporary := TemporaryName(directory)
	if locked {
		temporary = directory + TemporaryPrefix + name
		if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode) // O_EXCL follows no link
}

// abandonedAfter is when a temporary file is one that nobody writes any more.
const abandonedAfter = 24 * time.Hour

// RemoveAbandoned removes temporary files from a directory, where others may have files too, that
// have not been written for a day: what processes have left behind that were killed.
func RemoveAbandoned(directory string) {
	abandoned, _ := fs.Glob(os.DirFS(directory), TemporaryPrefix+strings.Repeat("[A-Z2-7]", len(rand.Text())))
	for _, name := range abandoned {
		name = filepath.Join(directory, name)
		if info, err := os.Lstat(name); err == nil && time.Since(info.ModTime()) > abandonedAfter {
			os.Remove(name)
		}
	}
}

// MoveNew gives a file or a directory another name on the same file system. The error wraps
// [fs.ErrExist] if there is something of that name.
func MoveNew(from, to string) error {
	err := Retry(func() error { return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE) })
	switch err {
	case nil:
		return nil
	case unix.EEXIST:
		return &fs.PathError{Op: "create", Path: to, Err: fs.ErrExist}
	case unix.EINVAL, unix.ENOSYS, unix.EPERM: // not on this file system, or in a sandbox
	default:
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	if os.Link(from, to) == nil {
		return os.Remove(from)
	}
	// It is a directory, or there are no links; or there is something.
	if _, err := os.Lstat(to); err == nil {
		return &fs.PathError{Op: "create", Path: to, Err: fs.ErrExist}
	}
	return os.Rename(from, to)
}

// SyncDirectory makes the names in a directory durable, where the file system can do that.
func SyncDirectory(directory string) error {
	d, err := os.Open(directory)
	if err != nil {
		return err
	}
	if err = d.Sync(); errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return errors.Join(err, d.Close())
}

// SyncData makes the bytes of a file durable, and of what is known about it as much as is needed to
// read them.
func SyncData(f *os.File) error {
	return onFile(f, "fdatasync", unix.Fdatasync)
}

// SyncFileSystem makes everything that was written to the file system of an open directory durable.
// Since Linux 5.8 it returns an error if that failed for anything written since the directory was
// opened.
func SyncFileSystem(directory *os.File) error {
	return onFile(directory, "sync", unix.Syncfs)
}

// PunchHole gives the space of a part of a file, in bytes, back to the file system. It does nothing
// where the file system cannot.
func PunchHole(f *os.File, offset, length int64) error {
	err := onFile(f, "fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return err
}

// onFile makes a system call on a file, which must be open.
func onFile(f *os.File, operation string, call func(fd int) error) error {
	if err := Retry(func() error { return call(int(f.Fd())) }); err != nil {
		return &fs.PathError{Op: operation, Path: f.Name(), Err: err}
	}
	return nil
}

// MakeDirectory makes a directory for state, where only its owner has access, with parents where
// all have, if it does not exist. It fails if the directory belongs to another user, or a symbolic
// link in its place to one that is not root: systemd makes such links (systemd.exec(5),
// CacheDirectory= with DynamicUser=).
func MakeDirectory(path string) error {
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(path)), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err == nil || !errors.Is(err, fs.ErrExist) {
		return err
	}
	var link, directory unix.Stat_t
	if err := errors.Join(unix.Lstat(path, &link), unix.Stat(path, &directory)); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	user := uint32(os.Geteuid())
	switch {
	case directory.Mode&unix.S_IFMT != unix.S_IFDIR:
		return &fs.PathError{Op: "open", Path: path, Err: unix.ENOTDIR}
	case directory.Uid != user, link.Uid != user && link.Uid != 0:
		return &fs.PathError{Op: "open", Path: path, Err: errForeign}
	}
	return nil
}

var (
	errForeign = errors.New("it belongs to another user")
	errShared  = errors.New("other users may write to it")
)

// OpenState opens a file of state. It must be a regular file, or, if flags has O_DIRECTORY, a
// directory, of this user, that others cannot write to; a symbolic link, a pipe or a device at path
// is refused at once.
func OpenState(path string, flags int) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0o600)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular() && flags&unix.O_DIRECTORY == 0:
		err = ErrSpecial
	case info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()):
		err = errForeign
	case info.Mode()&0o022 != 0:
		err = errShared
	}
	if err != nil {
		f.Close()
		return nil, nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return f, info, nil
}

// ReadState reads a file as [OpenState] opens it whole, of at most the given number of bytes. The
// error wraps [fs.ErrNotExist] if there is no file.
func ReadState(path string, most int) ([]byte, error) {
	f, info, err := OpenState(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	return readAll(f, path, info.Size(), most)
}

// Lock opens a lock file, which it makes with mode 0600 if need be, and takes its lock, for which
// it waits at most for the given time; 0 tries once. Errors wrap [ErrLocked] if another has it.
// Closing the file gives the lock back, and so does the end of the process. The file is never
// written to; it must be a regular file of this user, not a symbolic link.
func Lock(path string, wait time.Duration) (*os.File, error) {
	f, _, err := OpenState(path, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	if err := LockFile(f, wait); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// LockFile takes the lock of a file that is open, as [Lock] does. [UnlockFile] gives it back, too.
func LockFile(f *os.File, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for pause := 10 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		err := flock(f, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if err != unix.EWOULDBLOCK {
			return &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		if !time.Now().Before(deadline) {
			return &fs.PathError{Op: "lock", Path: f.Name(), Err: ErrLocked}
		}
		time.Sleep(pause)
	}
}

// UnlockFile gives back the lock of a file that stays open.
func UnlockFile(f *os.File) error { return flock(f, unix.LOCK_UN) }

// LockDirectory opens a directory as [OpenState] does, and takes its lock as flock(2) says. The
// error wraps [fs.ErrNotExist] if whoever had the lock before has removed the directory.
func LockDirectory(path string, how int) (*os.File, error) {
	d, _, err := OpenState(path, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	if err = flock(d, how); err == nil && !IsAt(d, path) {
		err = &fs.PathError{Op: "lock", Path: path, Err: fs.ErrNotExist}
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// IsAt reports whether a file that is open is still the one of that name.
func IsAt(f *os.File, path string) bool {
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(path)
	return err == nil && os.SameFile(opened, named)
}

func flock(f *os.File, how int) error {
	return Retry(func() error { return unix.Flock(int(f.Fd()), how) })
}

// Retry repeats a system call that a signal has interrupted: some file systems, of networks or in
// user space, let that happen to all that waits for them, and the runtime of Go sends signals.
func Retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// OpenAt opens a name in an open directory, or in [unix.AT_FDCWD].
func OpenAt(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = Retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// OpenResolved is OpenAt with a restriction on how the name is resolved (openat2(2)). The error is
// [unix.ENOSYS] before Linux 5.6 and in sandboxes.
func OpenResolved(dir int, name string, flags int, resolve uint64) (fd int, err error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve}
	err = Retry(func() (err error) {
		fd, err = unix.Openat2(dir, name, &how)
		return err
	})
	if err == unix.EPERM || err == unix.E2BIG {
		err = unix.ENOSYS
	}
	return fd, err
}

// OpenRegular opens a file that is no state of ours, whoever owns it. Anything but a regular file
// is refused at once: a device is not opened, and no writer of a pipe is waited for. Symbolic links
// are followed unless flags has O_NOFOLLOW.
func OpenRegular(path string, flags int) (*os.File, fs.FileInfo, error) {
	stat := os.Stat
	if flags&unix.O_NOFOLLOW != 0 {
		stat = os.Lstat
	}
	info, err := stat(path) // opening a device may do something
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: path, Err: ErrSpecial}
	}
	if err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	if info, err = f.Stat(); err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: path, Err: ErrSpecial}
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// ReadRegular reads a file of at most the given number of bytes as [OpenRegular] opens it.
func ReadRegular(path string, most int) ([]byte, error) {
	f, info, err := OpenRegular(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	return readAll(f, path, info.Size(), most)
}

// readAll reads a file, which should have size bytes, and closes it.
func readAll(f *os.File, path string, size int64, most int) ([]byte, error) {
	defer f.Close()
	b := bytes.NewBuffer(make([]byte, 0, min(size, int64(most))+bytes.MinRead))
	_, err := b.ReadFrom(io.LimitReader(f, int64(most)+1))
	if err == nil && b.Len() > most {
		err = &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("larger than %d bytes", most)}
	}
	if err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// ReadLimited reads a file of any kind, of at most the given number of bytes.
func ReadLimited(path string, most int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return readAll(f, path, 0, most)
}

// An Identity tells the contents of a file from what it had before. The zero one is that of no
// file.
type Identity struct {
	device, inode    uint64
	size             int64
	modified, status unix.Timespec
}

// unchanged is for how long a file must not have been changed to be known by its times, which are
// not exact.
const unchanged = time.Second

// Identify returns the identity of the file at path, after symbolic links: what is read from there
// later has other contents only if it has another identity. It is zero if there is no file, and if
// the file has been changed just now, so that another change need not show.
func Identify(path string) Identity {
	var s unix.Stat_t
	if unix.Stat(path, &s) != nil || time.Since(time.Unix(s.Ctim.Unix())) < unchanged {
		return Identity{}
	}
	return Identity{uint64(s.Dev), s.Ino, s.Size, s.Mtim, s.Ctim}
}

// Room is what there is room for in a file system.
type Room struct {
	Free    int64  // bytes that this user can still write
	Cluster int64  // bytes that a file of one byte takes
	files   uint64 // that can still be made
}

// RoomIn returns the room in the file system of a directory.
func RoomIn(directory string) (r Room, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(directory, &s); err != nil {
		return r, &fs.PathError{Op: "statfs", Path: directory, Err: err}
	}
	r = Room{Free: int64(min(s.Bavail, 1<<40)) * int64(s.Frsize), Cluster: int64(s.Frsize), files: s.Ffree}
	if s.Files == 0 { // it has no bound
		r.files = math.MaxUint64
	}
	return r, nil
}

// Holds reports whether there is room for so many bytes in files of leastFile bytes: many file
// systems have a bound on the number of files.
func (r Room) Holds(size int64) bool {
	const leastFile = 4 << 10
	return r.Free >= size && r.files >= uint64(size)/leastFile
}
