// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sync/semaphore"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// ErrDamaged is wrapped by errors that say that the index is not one that this version of the store
// wrote: it was damaged, is missing, or has another format. [Rebuild] makes a new one. When it is
// returned by a store that is open, that must be opened anew.
var ErrDamaged = errors.New("index is damaged or of another version")

// errFull says that there is no room although all has been evicted that may be.
var errFull = errors.New("block store is full")

// MinBytes is the least limit that a store can have.
const MinBytes = 1 << 20

const (
	// queueBytes is the greatest number of bytes of blocks that are being put at a time; further
	// calls of Put wait.
	queueBytes = 64 << 20
	// hintBytes is the memory for remembering where blocks are, without which a read costs a search
	// of the index: 16 bytes for each block. It is not touched before it is needed.
	hintBytes = 32 << 20
	// lockName is the file whose lock is held while the store is open.
	lockName = "lock"
)

// Options says how a [Store] works. The zero value is a store without limit.
type Options struct {
	// MaxBytes is the greatest number of bytes of blocks to keep; 0 for no limit, else at least
	// MinBytes. The least recently used blocks are evicted a little before it is reached: at 31/32
	// of it, or 16 MiB below it, whichever is greater. If there is more when the store is opened,
	// it is evicted then.
	MaxBytes int64

	// Of tests; 0 stands for the constants and for a clock from now on.
	queueBytes int64
	hintBytes  int
	now        func() uint32 // the time of an access, in quarters of a second
	checking   func(ctx context.Context)
}

// Store is a store of blocks in a directory. Its methods are safe for use by many goroutines at a
// time, and made for it. It is a [fetch.Store]. It must be closed.
type Store struct {
	directory string
	options   Options
	lock      *os.File
	index     *bbolt.DB
	indexFile os.FileInfo // of the index
	slabs     [classes]*slab
	hints     *hints

	room  *semaphore.Weighted // of bytes in the queue
	queue chan *request
	gate  sync.RWMutex // held for reading while sending to the queue
	shut  bool         // under gate: the queue is closed

	writer   writer
	endCheck context.CancelFunc // ends the writer's check of the index
	running  sync.WaitGroup     // of the writer
	final    error              // of the writer, once it has ended

	failure      atomic.Pointer[error] // why no more is written, if so
	committing   atomic.Bool           // the writer is at work
	damaged      atomic.Bool           // the index cannot be used, nor closed
	reads        chan struct{}         // has a value for each that is under way
	hits, misses atomic.Int64
	progress     progress

	close func() error // end, once
}

// Open opens the store in a directory, which it makes if need be. Errors wrap [files.ErrLocked] if
// the store is open already, [ErrDamaged] if its index cannot be used, and else are those of the
// file system.
//
// It takes a few milliseconds, and about one more for each million blocks. Then the whole index is
// checked, a second or so for each million blocks: calls of Put wait for that, and others do not.
// [Store.Err] tells if it is damaged; [Store.Interrupt] ends it.
func Open(directory string, options Options) (*Store, error) {
	s, err := open(directory, options)
	if err != nil {
		return nil, fmt.Errorf("block store %q: %w", directory, err)
	}
	return s, nil
}

func open(directory string, options Options) (_ *Store, err error) {
	options.queueBytes = cmp.Or(options.queueBytes, queueBytes)
	options.hintBytes = cmp.Or(options.hintBytes, hintBytes)
	if options.now == nil {
		options.now = clock(time.Now())
	}
	if options.MaxBytes < 0 || options.MaxBytes > 0 && options.MaxBytes < MinBytes {
		return nil, fmt.Errorf("limit of %d bytes is below the least possible, %d", options.MaxBytes, MinBytes)
	}
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, err
	}
	s := &Store{
		directory: directory,
		options:   options,
		hints:     newHints(options.hintBytes),
		room:      semaphore.NewWeighted(options.queueBytes),
		queue:     make(chan *request, maxBatchBlocks),
		reads:     make(chan struct{}, maxReads),
	}
	defer func() {
		if err != nil {
			s.fail(err) // or its checksum would vouch for an index that nobody has checked
			err = errors.Join(err, s.closeFiles())
		}
	}()
	if s.lock, err = files.Lock(filepath.Join(directory, lockName), 0); err != nil {
		return nil, err
	}
	if err := s.openFiles(); err != nil {
		return nil, err
	}
	s.writer.store, s.close = s, sync.OnceValue(s.end)
	s.progress.stats.hold(s.writer.state)
	ctx, cancel := context.WithCancel(context.Background())
	s.endCheck = cancel
	s.running.Go(func() { s.final = s.writer.run(ctx) })
	return s, nil
}

// openFiles opens the index, reads what is kept in memory of it, and opens the slabs.
func (s *Store) openFiles() error {
	path := filepath.Join(s.directory, indexName)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		for c := range classes {
			name, _ := slabNames(c)
			if info, err := os.Stat(filepath.Join(s.directory, name)); err == nil && info.Size() > 0 {
				return fmt.Errorf("%w: there are blocks, but %s is missing", ErrDamaged, indexName)
			}
		}
		if _, err := makeIndex(s.directory, func(*bbolt.DB) (state, error) { return state{}, nil }); err != nil {
			return fmt.Errorf("making the index: %w", err)
		}
	}
	var err error
	if s.index, err = openIndex(path); err != nil {
		return err
	}
	if s.indexFile, err = os.Stat(path); err != nil {
		return err
	}
	var taken [classes][]*bitmap
	if err := guard(func() error {
		return s.index.View(func(tx *bbolt.Tx) (err error) {
			s.writer.state, taken, err = loadIndex(tx)
			return err
		})
	}); err != nil {
		return err
	}
	for c := range classes {
		if n := slotsTaken(taken[c]); n != s.writer.state.blocks[c] {
			return fmt.Errorf("%w: %d blocks in %d slots", ErrDamaged, s.writer.state.blocks[c], n)
		}
		s.slabs[c], err = openSlab(s.directory, c, taken[c], s.options.now())
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w: it has blocks of %d bytes, and their file is missing", ErrDamaged, c.size())
		} else if err != nil {
			return err
		}
	}
	return files.SyncDirectory(s.directory)
}

// Interrupt ends the check of the index, if it is under way. Calls of Put that wait for it fail, as
// do all further ones. It is for who is about to close the store, as Close does it too.
func (s *Store) Interrupt() { s.endCheck() }

// Close lets calls of Put that are under way come to their end, and closes the store. It returns an
// error if the times of access or the checksum of the index, which is read for that unless it takes
// seconds, could not be saved, or a file could not be closed; blocks that were acknowledged are
// durable in any case. Further calls return the same again.
func (s *Store) Close() error { return s.close() }

func (s *Store) end() error {
	s.Interrupt() // first: those who hold the gate may wait for the check
	s.gate.Lock()
	s.shut = true
	close(s.queue)
	s.gate.Unlock()
	s.running.Wait()
	if err := errors.Join(s.final, s.closeFiles()); err != nil {
		return fmt.Errorf("closing block store %q: %w", s.directory, err)
	}
	return nil
}

func (s *Store) closeFiles() error {
	var err error
	if s.index != nil {
		err = s.closeIndex()
	}
	for _, slab := range s.slabs {
		if slab != nil {
			err = errors.Join(err, slab.close())
		}
	}
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

// inPlace returns an error if the index is not where it was opened: what was stored now would be
// gone with the process.
func (s *Store) inPlace() error {
	info, err := os.Stat(filepath.Join(s.directory, indexName))
	if err == nil && !os.SameFile(info, s.indexFile) {
		err = errors.New("another index is in its place")
	}
	return err
}

// fail makes all further writes fail.
func (s *Store) fail(err error) {
	err = fmt.Errorf("block store %q takes no more blocks until it is opened anew: %w", s.directory, err)
	s.failure.CompareAndSwap(nil, &err)
}

// Err returns why the store takes no more blocks until it is opened anew, or nil. Whoever keeps a
// store open for long should ask now and then. If it wraps [ErrDamaged], blocks that are there may
// not be found until then.
func (s *Store) Err() error {
	if err := s.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// clock returns the time in quarters of a second since 2024, which a uint32 holds until 2058. It
// goes on by itself from a time, which is now: if that of the machine were set back, what is used
// from then on would be evicted first.
func clock(now time.Time) func() uint32 {
	const epoch = 1704067200 // 2024-01-01
	begin := time.Now()
	return func() uint32 {
		t := (now.Add(time.Since(begin)).UnixMilli() - epoch*1000) / 250
		return uint32(min(max(t, 0), math.MaxUint32))
	}
}
