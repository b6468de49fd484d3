// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/ahead"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/guixdb"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
)

const (
	// leastAheadWorkers is how many large items are restored at the same time at least: while one
	// waits for the line, another one can be decompressed.
	leastAheadWorkers = 2
	// mostAheadWorkers bounds the memory that they take.
	mostAheadWorkers = 4
	// narinfoShare is the part of the connections to a server that is for narinfos when items are
	// substituted: most narinfos have been fetched before.
	narinfoShare = 8
	// atOnceOfClosing is how many items are substituted ahead at the same time from a server that
	// closes each connection.
	atOnceOfClosing = 4
)

func (s *Settings) aheadItems() int {
	if s.narConnections() < 2 {
		return 0 // the connection is for what the daemon waits for
	}
	return s.file.AheadItems
}

// daemonSession returns what is noted about the daemon process that has started this one, or nil.
func (s *Settings) daemonSession() *ahead.Session {
	directory := s.inCache("sessions")
	if directory == "" || s.aheadItems() <= 0 {
		return nil
	}
	if s.parent == nil {
		var err error
		if s.parent, err = ahead.SessionOf(directory, os.Getppid()); err != nil {
			return nil // without /proc
		}
	}
	return s.parent.Anew()
}

// ahead returns what substitutes ahead of the daemon. It must be closed.
func (s *Settings) ahead(sub *Session) *ahead.Ahead {
	bytes, _ := bytesize.Parse(s.file.AheadBytes) // which settings.Read has looked at
	return ahead.New(sub.Substituter, ahead.Options{
		StoreDir: s.Store,
		Session:  s.daemonSession(),
		Items:    s.aheadItems(),
		Bytes:    bytes,
		AtOnce: func() int {
			if sub.Mirrors.Closing() {
				return atOnceOfClosing
			}
			return s.narConnections() - 1 // one is left for what the daemon waits for
		},
		Workers: min(max(leastAheadWorkers, runtime.NumCPU()), mostAheadWorkers),
		Before:  s.counted,
		Counted: func(t ahead.Stats) {
			if s.counted = t; s.tell != nil {
				s.tell(t)
			}
		},
	})
}

func (s *Settings) narConnections() int {
	connections := s.file.NarinfoConnections
	if connections <= 0 {
		connections = mirror.DefaultConnections
	}
	return max(1, connections-max(1, connections/narinfoShare))
}

// CleanOption is the option of a helper that cleans up after another one; see [CleanAfter].
const CleanOption = "--clean"

// guard starts what removes what is staged, and writes down what was counted, when this process has
// ended.
func (s *Settings) guard() {
	if session := s.daemonSession(); session != nil {
		s.tell = session.Guard(s.Store, "substitute", CleanOption, s.inCache("sources"))
	}
}

// CleanAfter is what a helper runs with [CleanOption], the file of what is known of sources, the
// store and the name of a session: see [ahead.CleanAfter].
func CleanAfter(sources, store, session string) {
	state, last := sourcestate.Open(sources), ahead.CleanAfter(os.Stdin, store, session)
	state.CountAhead(sourcestate.Ahead{
		Staged: int64(last.Staged.Items), StagedBytes: last.Staged.Bytes, Used: int64(last.Used.Items), UsedBytes: last.Used.Bytes,
	})
	state.Save()
}

func (s *Settings) clean() {
	if directory := s.inCache("sessions"); directory != "" {
		ahead.CleanSessions(directory)
	}
	ahead.CleanStages(s.Store)
}

const (
	// databaseTimeout is for how long an item waits while the database is locked, which may be
	// fetched instead, and databaseRest is for how long nobody waits again then.
	databaseTimeout = 500 * time.Millisecond
	databaseRest    = 20 * databaseTimeout
)

// finder returns what finds older items of the store to make new ones of, or nil. The daemon's
// database is opened when there is an item of which it is to be asked.
func (s *Settings) finder() (finder *reuse.Finder, closeDatabase func()) {
	if !s.file.Reuse {
		return nil, func() {}
	}
	var database *guixdb.Database
	open := sync.OnceValue(func() (err error) {
		database, err = guixdb.Open(settings.DatabaseFile(), s.Store, databaseTimeout)
		return err
	})
	var locked atomic.Int64 // until when it is taken to be, as Unix time in nanoseconds
	find := func(ctx context.Context, hashPart string) (*narinfo.Narinfo, error) {
		if err := open(); err != nil {
			return nil, fmt.Errorf("%w: %w", reuse.ErrNoDatabase, err)
		}
		begin := time.Now()
		if begin.UnixNano() < locked.Load() {
			return nil, errors.New("the database of guix-daemon is locked")
		}
		info, err := database.Item(ctx, hashPart)
		if end := time.Now(); err != nil && end.Sub(begin) >= databaseTimeout {
			locked.Store(end.Add(databaseRest).UnixNano())
		}
		return info, err
	}
	return reuse.New(reuse.Config{StoreDir: s.Store, Database: find, MissesFile: s.inCache("reuse")}), func() {
		if database != nil {
			database.Close()
		}
	}
}
