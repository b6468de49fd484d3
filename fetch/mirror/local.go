// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// LocalDirectories returns what the directory of a file: URL may be called: as the URL has it, and
// with its percent signs interpreted. Other URLs have none.
func LocalDirectories(rawURL string) []string {
	l, err := parse(rawURL)
	if err != nil || l.scheme != "file" {
		return nil
	}
	directory := strings.TrimSuffix(l.target, "/")
	return []string{directory, unescaped(directory)}
}

// narinfosFromDirectory answers from the directory of a file: URL.
func (c *Client) narinfosFromDirectory(ctx context.Context, l *location, hashes []string, answer func(Answer)) error {
	directory := strings.TrimSuffix(l.target, "/")
	var skipped error
	for _, hash := range hashes {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a := Answer{Hash: hash, Status: http.StatusOK, MaxAge: -1}
		f, err := c.openFile(directory + "/" + hash + ".narinfo")
		if err == nil {
			a.Body, err = io.ReadAll(io.LimitReader(f, MaxNarinfo+1))
			f.Close()
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			a.Status = http.StatusNotFound
		case err != nil:
			// That is one file, not the others.
			if skipped == nil {
				skipped = &ServerError{Server: "file:" + directory, Err: err}
			}
			continue
		case len(a.Body) > MaxNarinfo:
			a.Body = nil
		}
		answer(a)
	}
	return skipped
}

func (c *Client) openNarFile(ctx context.Context, l *location) (*Nar, error) {
	f, err := c.openFile(l.target)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	n := &Nar{URL: l.String(), Size: info.Size(), total: -1, body: f}
	n.ctx, n.stop = context.WithCancelCause(ctx)
	n.cancel = n.stop
	return n, nil
}

// openFile opens the file of a file: URL. Guix takes names as they stand; but those who make URLs
// encode what cannot stand in one.
func (c *Client) openFile(name string) (*os.File, error) {
	f, err := c.openLocal(name)
	if errors.Is(err, fs.ErrNotExist) {
		if f, err := c.openLocal(unescaped(name)); !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	return f, err
}

func (c *Client) openLocal(name string) (*os.File, error) {
	if c.o.PublicFiles == nil {
		f, _, err := files.OpenRegular(name, os.O_RDONLY)
		return f, err
	}
	for _, root := range c.o.PublicFiles {
		for _, directory := range LocalDirectories(root) {
			if below, ok := strings.CutPrefix(name, directory+"/"); ok {
				if f, err := openPublic(directory, below); err == nil {
					return f, nil
				}
			}
		}
	}
	return nil, &shortError{name + ": there is no such file that everybody may read", fs.ErrNotExist}
}

// unescaped returns the name of a file with its percent signs interpreted, if that makes sense.
func unescaped(name string) string {
	if d, err := url.PathUnescape(name); err == nil && !strings.Contains(d, "\x00") {
		return d
	}
	return name
}

// openPublic opens a regular file below a directory, as somebody could who has no rights but those
// that everybody has, and follows no symbolic link below it.
func openPublic(directory, below string) (*os.File, error) {
	resolved, err := filepath.EvalSymlinks(directory)
	if err != nil {
		return nil, err
	}
	// What is a link by now is not followed any more.
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW
	at, err := files.OpenAt(unix.AT_FDCWD, "/", flags, 0)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(at) }()
	path := strings.FieldsFunc(resolved+"/"+below, func(r rune) bool { return r == '/' })
	for i, name := range path {
		var stat unix.Stat_t
		if err := unix.Fstat(at, &stat); err != nil {
			return nil, err
		}
		if name == ".." || stat.Mode&0o001 == 0 {
			return nil, fs.ErrPermission
		}
		if i == len(path)-1 {
			return openPublicFile(at, name)
		}
		next, err := files.OpenAt(at, name, flags, 0)
		if err != nil {
			return nil, err
		}
		unix.Close(at)
		at = next
	}
	return nil, fs.ErrInvalid
}

func openPublicFile(at int, name string) (*os.File, error) {
	public := func(stat *unix.Stat_t) bool { return stat.Mode&unix.S_IFMT == unix.S_IFREG && stat.Mode&0o004 != 0 }
	var stat unix.Stat_t
	if err := files.Retry(func() error { return unix.Fstatat(at, name, &stat, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return nil, err
	}
	if !public(&stat) {
		return nil, fs.ErrPermission
	}
	fd, err := files.OpenAt(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	if err = unix.Fstat(fd, &stat); err == nil && !public(&stat) {
		err = fs.ErrPermission
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
