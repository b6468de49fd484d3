// SPDX-License-Identifier: GPL-3.0-or-later

// Package unixsocket makes Unix sockets to listen on, where a dead server may have left one. Start
// with [Listen].
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// ErrInUse is wrapped by the error of [Listen] if a living server listens on the socket, or seems
// to.
var ErrInUse = errors.New("another server listens on it")

// maxPath is the longest path that the address of a Unix socket can hold, on Linux (unix(7)).
const maxPath = 107

// Listen listens on a stream socket at an absolute path, whose directory it makes if need be, with
// mode 0755. Who may connect is decided by the permission to write to the socket: it gets the given
// mode, and the group with the given ID unless that is negative. Nobody can connect before that is
// done (on Linux).
//
// A socket that a dead server has left is replaced; anything else at the path is left alone. With
// ErrInUse wrapped, a living server has the socket. Of several servers that start at the same time,
// one gets it: they agree by a lock on the file with ".lock" behind the path, which stays. Closing
// the listener removes the socket.
func Listen(path string, mode fs.FileMode, group int) (net.Listener, error) {
	l, err := listen(path, mode, group)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func listen(path string, mode fs.FileMode, group int) (_ net.Listener, err error) {
	if !filepath.IsAbs(path) || len(path) > maxPath {
		return nil, fmt.Errorf("path must be absolute and have at most %d bytes", maxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	lock, err := files.Lock(path+".lock", 0)
	if errors.Is(err, files.ErrLocked) {
		return nil, ErrInUse
	} else if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := removeDead(path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// On Linux the socket in the file system gets the mode that the descriptor had. Elsewhere
		// the call may fail.
		return c.Control(func(fd uintptr) { _ = unix.Fchmod(int(fd), 0) })
	}}
	inner, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	made, err := os.Lstat(path)
	l := &listener{UnixListener: inner.(*net.UnixListener)}
	l.SetUnlinkOnClose(false)
	l.close = sync.OnceValue(func() (err error) {
		// Before the socket is dead, nobody else replaces it; afterwards it may be somebody else's.
		if info, e := os.Lstat(path); e == nil && made != nil && os.SameFile(info, made) {
			err = os.Remove(path)
		}
		return errors.Join(err, l.UnixListener.Close(), lock.Close())
	})
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	if group >= 0 {
		if err := os.Lchown(path, -1, group); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(path, mode.Perm()); err != nil {
		return nil, err
	}
	return l, nil
}

// removeDead removes a socket that nobody listens on.
func removeDead(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something else than a socket")
	}
	conn, err := net.DialTimeout("unix", path, 5*time.Second)
	switch {
	case err == nil:
		conn.Close()
		return ErrInUse
	case errors.Is(err, unix.ECONNREFUSED):
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return nil
}

// listener removes its socket when it is closed.
type listener struct {
	*net.UnixListener
	close func() error
}

func (l *listener) Close() error { return l.close() }
