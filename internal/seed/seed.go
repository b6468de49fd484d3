// SPDX-License-Identifier: GPL-3.0-or-later

// Package seed puts nars that were fetched over HTTP, compressed as they came, into a block store
// of this machine, so that others get them from there: by the read capability that their publisher,
// or whoever annotates its narinfos, says. Start with [Open].
//
// A nar is copied to a file while it is fetched; nobody waits for the store. Only if it was the
// right one, the file is encoded, and removed. What is left when the process is killed, as the
// daemon does with its helpers, the next one goes on with.
package seed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

const (
	// maxBytes bounds the copies of a directory; what comes beyond it is not seeded.
	maxBytes = 1 << 30
	// maxAge is when a copy is removed that could not be put into the store, or was left by a
	// process that was killed before it was whole.
	maxAge = 24 * time.Hour
	// workers is how many blocks are put at a time: a store answers late, but many at once.
	workers = 4
	// closeTime is for how long Close goes on with copies.
	closeTime = 10 * time.Second
	// wholePrefix begins the names of copies that are whole.
	wholePrefix = "nar-"
)

// Seeds are the nars of a directory that are on their way to a store. A nil one takes none. It is
// safe for concurrent use, also by several processes.
type Seeds struct {
	directory string
	store     fetch.Store
	failed    func(error)
	more      chan struct{}
	begun     atomic.Int64 // bytes that copies under way may have
	stop      context.CancelFunc
	done      sync.WaitGroup
}

// Open goes on with the nars in a directory, and takes further ones, for which it makes the
// directory. They go into the store, which Close closes. Failed is told, from any goroutine, what
// cannot be done for now. Close must be called at the end.
func Open(directory string, store fetch.Store, failed func(error)) *Seeds {
	ctx, stop := context.WithCancel(context.Background())
	s := &Seeds{directory: directory, store: store, failed: failed, more: make(chan struct{}, 1), stop: stop}
	s.more <- struct{}{}
	s.done.Go(func() {
		for range s.more {
			if err := s.put(ctx); err != nil && ctx.Err() == nil {
				failed(fmt.Errorf("seeding what was fetched: %w", err))
			}
		}
	})
	return s
}

// Close goes on with what has been taken for some seconds; the rest is for another process. No copy
// may be under way.
func (s *Seeds) Close() {
	if s == nil {
		return
	}
	close(s.more)
	defer time.AfterFunc(closeTime, s.stop).Stop()
	s.done.Wait()
	s.store.Close()
}

// put puts all copies that are whole into the store. One that cannot be read, or that the store
// does not want, holds up no other.
func (s *Seeds) put(ctx context.Context) error {
	names, failed := filepath.Glob(filepath.Join(s.directory, wholePrefix+"*"))
	for _, name := range names {
		failed = cmp.Or(failed, s.putCopy(ctx, name))
	}
	return failed
}

func (s *Seeds) putCopy(ctx context.Context, name string) error {
	f, _, err := files.OpenRegular(name, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // another process has put it
	} else if err != nil {
		return err
	}
	defer f.Close()
	if _, err := eris.Encode(ctx, f, s.store.Put, eris.EncodeOptions{Workers: workers}); err != nil {
		return err
	}
	os.Remove(name)
	return nil
}

// A Copy is that of a nar that is being fetched. It is for one goroutine at a time. A nil one takes
// nothing.
type Copy struct {
	s    *Seeds
	f    *os.File
	size int64 // that it may have
	err  error // of writing
}

// Begin returns a copy of a nar that has so many bytes before it is compressed; it must be ended.
// It is nil if there is no room: a copy takes at most half of what the file system has left, for
// others need it more.
func (s *Seeds) Begin(size uint64) *Copy {
	if s == nil || size > maxBytes {
		return nil
	}
	c := &Copy{s: s, size: int64(size)}
	var err error
	if c.f, err = s.create(s.begun.Add(c.size)); err != nil {
		s.failed(err)
	}
	if c.f == nil {
		s.begun.Add(-c.size)
		return nil
	}
	return c
}

// create makes a file, if there is room for all that are begun, and removes those that are too old.
func (s *Seeds) create(size int64) (*os.File, error) {
	if err := files.MakeDirectory(s.directory); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.directory)
	if err != nil {
		return nil, err
	}
	if room, err := files.RoomIn(s.directory); err != nil || size > room.Free/2 {
		return nil, err
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > maxAge {
			os.Remove(filepath.Join(s.directory, e.Name()))
		} else if err == nil {
			size += info.Size()
		}
	}
	if size > maxBytes {
		return nil, nil
	}
	return os.CreateTemp(s.directory, files.TemporaryPrefix+"*")
}

// Write takes what has come next. It never fails: what cannot be copied is given up, and takes no
// more room on a disk that may be full.
func (c *Copy) Write(p []byte) (int, error) {
	if c != nil && c.err == nil {
		if _, c.err = c.f.Write(p); c.err != nil {
			c.f.Truncate(0)
		}
	}
	return len(p), nil
}

// End ends the copy. If what was written is whole and right, it goes to the store.
func (c *Copy) End(right bool) {
	if c == nil {
		return
	}
	c.s.begun.Add(-c.size)
	name := c.f.Name()
	err := errors.Join(c.err, c.f.Close())
	if right && err == nil {
		err = os.Rename(name, filepath.Join(c.s.directory, wholePrefix+filepath.Base(name)[len(files.TemporaryPrefix):]))
	}
	if right && err != nil {
		c.s.failed(err)
	}
	if !right || err != nil {
		os.Remove(name)
		return
	}
	select {
	case c.s.more <- struct{}{}:
	default:
	}
}
