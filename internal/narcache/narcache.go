// SPDX-License-Identifier: GPL-3.0-or-later

// Package narcache keeps compressed nars in files, as "guix publish --cache" does, so that each is
// made once, its size is known, and it can be had for a while after the item has left the store.
// Start with [New].
package narcache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/tasks"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

const (
	// leastTTL is for how long a nar is kept at least that nobody asks for, and usedEvery how
	// exactly it is noted that somebody does.
	leastTTL  = 30 * 24 * time.Hour
	usedEvery = time.Hour
	// cleanEvery is when it is looked again what can be removed.
	cleanEvery = 24 * time.Hour
)

// A Cache keeps nars in files of the names that it is given. It is safe for concurrent use.
type Cache struct {
	directory string
	log       func(format string, a ...any)
	ttl       time.Duration
	making    *tasks.Tasks // by file name
	cleaned   atomic.Int64 // when, as Unix time in seconds
}

// New returns what is kept in a directory, which is made when there is something to keep; of what
// is made, workers at a time, at least 1. What nobody has asked for in ttl, or in 30 days if that
// is longer, is removed now, and every day that something is made. Messages go to log. Close must
// be called at the end.
func New(directory string, workers int, ttl time.Duration, log func(format string, a ...any)) *Cache {
	c := &Cache{directory: directory, log: log, ttl: max(ttl, leastTTL), making: tasks.New(workers, log)}
	c.clean()
	return c
}

// Close ends what goes on in the background, and waits for it. What is half made is removed.
func (c *Cache) Close() { c.making.Close() }

// clean removes, once a day, what has not been used for long, and what a process has left that was
// killed.
func (c *Cache) clean() {
	now, last := time.Now().Unix(), c.cleaned.Load()
	if now-last < int64(cleanEvery/time.Second) || !c.cleaned.CompareAndSwap(last, now) {
		return
	}
	files.RemoveAbandoned(c.directory)
	entries, err := os.ReadDir(c.directory)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log("%v", err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > c.ttl {
			os.Remove(filepath.Join(c.directory, e.Name()))
		}
	}
}

func (c *Cache) file(name string) string { return filepath.Join(c.directory, name) }

// Size returns the length of a nar in bytes, if it is kept.
func (c *Cache) Size(name string) (size uint64, ok bool) {
	info, err := os.Lstat(c.file(name))
	if err != nil {
		return 0, false
	}
	return uint64(info.Size()), true
}

// Open opens a nar. The error wraps [fs.ErrNotExist] if it is not kept.
func (c *Cache) Open(name string) (*os.File, error) {
	c.Used(name)
	f, _, err := files.OpenRegular(c.file(name), os.O_RDONLY)
	return f, err
}

// Used notes that somebody has asked for what is in a file of the directory, if it is there.
func (c *Cache) Used(name string) {
	info, err := os.Lstat(c.file(name))
	if now := time.Now(); err == nil && now.Sub(info.ModTime()) > usedEvery {
		os.Chtimes(c.file(name), time.Time{}, now)
	}
}

// Make has a nar made in the background, if it is not kept, by write, which writes the compressed
// nar to one writer and the nar as it is to another. That must have the hash, or it is not kept.
// Failures are logged; then it can be tried again in a minute.
func (c *Cache) Make(name string, hash [sha256.Size]byte, write func(ctx context.Context, compressed, plain io.Writer) error) {
	c.making.Start(name, func(ctx context.Context) error {
		if _, ok := c.Size(name); ok {
			return nil // it has just been made
		}
		if err := files.MakeDirectory(c.directory); err != nil {
			return err
		}
		c.clean()
		return files.Replace(c.file(name), 0o600, files.Options{}, func(w io.Writer) error {
			sum := sha256.New()
			err := write(ctx, w, sum)
			if err == nil && [sha256.Size]byte(sum.Sum(nil)) != hash {
				err = fmt.Errorf("%s: other contents than the narinfo says: %w", name, tasks.ErrHopeless)
			}
			return err
		})
	})
}

// Directory returns the directory in which [Cache.Note] keeps narinfos.
func (c *Cache) Directory() string { return c.directory }

// Note keeps what is known of an item for when it has left the store: a narinfo without signature
// that names no nar, in the file HASH.narinfo.
func (c *Cache) Note(item *narinfo.Narinfo) error {
	part, err := narinfo.SignedPart(item)
	if err != nil {
		return err
	}
	text, err := narinfo.Text(part, "", []narinfo.URL{{URL: "nar", Compression: "none"}})
	if err != nil {
		return err
	}
	hashPart, _, _ := strings.Cut(filepath.Base(item.StorePath), "-")
	name := hashPart + ".narinfo"
	if kept, err := files.ReadRegular(c.file(name), narinfo.MaxSize); err == nil && string(kept) == text {
		c.Used(name)
		return nil
	}
	return files.Write(c.file(name), 0o600, files.Options{}, []byte(text))
}
