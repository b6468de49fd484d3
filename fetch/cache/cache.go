// SPDX-License-Identifier: GPL-3.0-or-later

// Package cache keeps blocks that have been fetched on disk, encrypted as they
// came, so that a substitution that was killed and is tried again fetches only
// what is missing. Start with [Open] and [Through]; where a local store daemon is
// to be the cache, with [ThroughStore].
//
// All processes that open one directory share one file of bounded size, and see
// each other's blocks at once. In it the blocks lie one behind the other, 1 KiB or
// 32 KiB each, and the oldest are overwritten by the newest; a block that is used
// when its turn is near is written again. Beside them there is a hash table of 8
// bytes per entry, so that opening costs the same for any size, a miss is one read
// of 512 bytes, of a part of the file that the kernel keeps in memory, and no
// memory of the process grows with the cache.
//
// Nothing in the file is trusted. Each block is checked against its reference when
// it is read, so that neither a process that is killed at any instant, nor a power
// failure, nor two writers of one place can do worse than lose blocks. Nothing is
// flushed to the disk: what was written before a process was killed is there for
// the next, what was written before a power failure perhaps.
//
// The cache never fails a fetch. If the disk is full, slow or damaged, or the
// directory cannot be used, blocks are not kept, and not found.
//
// What it costs is a few system calls. Measured in processor time on a busy virtual
// machine with two cores, in memory (/dev/shm), where a read of 512 bytes takes 2 µs
// and the hash of a block 2 µs (1 KiB) or 64 µs (32 KiB), medians of three runs of
// the benchmarks of 25 November 2026: a miss 2 µs; a hit 6 µs (1 KiB) or 84 µs
// (32 KiB), the hash included; to keep a block that was missed 7 µs (1 KiB) or 23 µs
// (32 KiB), which is 150 000 blocks or 1.4 GB per second and core; Put, which looks
// first whether the block is there, 9 to 13 µs (1 KiB). To open a cache that has
// 2 GiB of blocks of 1 KiB, get one and close it takes 0.2 ms.
package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A Cache keeps blocks in a directory. It is safe for concurrent use, and so is
// the directory. Close must be called at the end. The methods of a nil Cache do
// nothing, and find nothing.
type Cache struct {
	directory string
	maxBytes  int64
	onFailure func(error)

	once   sync.Once
	ring   *ring        // nil before it is opened, and where it could not be
	open   sync.RWMutex // held by those who use the file
	closed bool         // under open

	broken atomic.Bool // reading has failed
	paused atomic.Int64
	hits   atomic.Uint64
	writer writer
}

const (
	// mostBatch bounds the blocks that are written at a time, in bytes; as many may
	// wait for that meanwhile.
	mostBatch = 1 << 20
	// patience is how long Put waits for room where the disk is slow, once; after
	// that it drops blocks until there is some.
	patience = 500 * time.Millisecond
	// closePatience is how long Close waits for the disk.
	closePatience = 2 * time.Second
	// pause is for how long nothing is kept after writing has failed.
	pause = 5 * time.Second
	// refreshHits is after how many hits the cache looks how much other processes
	// have written.
	refreshHits = 256
)

// Open opens the cache in a directory, which it creates if need be, for blocks of
// at most maxBytes bytes together, which is also about the greatest size of the
// file; at least 1 MiB. If there is a cache of another size it is given up. Errors
// are of the file system, or tell that others than the user of this process could
// write there.
func Open(directory string, maxBytes int64) (*Cache, error) {
	c := OpenLater(directory, maxBytes, nil)
	var err error
	c.once.Do(func() { c.ring, err = open(directory, maxBytes) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

// OpenLater is like Open, but opens the cache when it is first used. If that fails,
// onFailure is called with the error unless it is nil, and the cache stays empty.
func OpenLater(directory string, maxBytes int64, onFailure func(error)) *Cache {
	c := &Cache{directory: directory, maxBytes: maxBytes, onFailure: onFailure}
	c.writer.most = int(max(min(mostBatch, maxBytes/32), int64(eris.BlockSize32KiB)))
	c.writer.swapped = make(chan struct{})
	return c
}

func open(directory string, maxBytes int64) (*ring, error) {
	r, err := openIn(directory, maxBytes)
	if err != nil {
		return nil, fmt.Errorf("cache of blocks %s: %w", directory, err)
	}
	return r, nil
}

func openIn(directory string, maxBytes int64) (*ring, error) {
	if err := os.MkdirAll(filepath.Dir(directory), 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(directory, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	// Everything below goes by the directory itself, whatever takes its name later.
	root, err := os.OpenRoot(directory)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	info, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	if !ours(info) {
		return nil, errNotOurs
	}
	return openRing(root, maxBytes)
}

// use returns the ring, which must be given back with c.open.RUnlock, or nil.
func (c *Cache) use() *ring {
	if c == nil {
		return nil
	}
	c.once.Do(func() {
		var err error
		if c.ring, err = open(c.directory, c.maxBytes); err != nil && c.onFailure != nil {
			c.onFailure(err)
		}
	})
	if c.ring == nil || c.broken.Load() {
		return nil
	}
	c.open.RLock()
	if c.closed {
		c.open.RUnlock()
		return nil
	}
	return c.ring
}

// Get implements [eris.Blocks]. The error is always eris.ErrNotFound. The file is
// read without regard to ctx.
func (c *Cache) Get(_ context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	block, again := c.get(&ref, size, dst)
	if block == nil {
		return nil, eris.ErrNotFound
	}
	if again {
		c.add(&ref, block)
	}
	return block, nil
}

// Verified implements [eris.VerifiedBlocks].
func (c *Cache) Verified() {}

// get returns a block or nil, and whether its turn to be overwritten is near.
func (c *Cache) get(ref *eris.Reference, size eris.BlockSize, dst []byte) (block []byte, again bool) {
	if !size.Valid() {
		return nil, false
	}
	r := c.use()
	if r == nil {
		return nil, false
	}
	defer c.open.RUnlock()
	s, ok, err := r.find(ref, size)
	if !ok {
		c.check(err)
		return nil, false
	}
	if cap(dst) < int(size) {
		dst = make([]byte, size)
	}
	block = dst[:size]
	ok, err = r.read(block, s)
	if err != nil {
		c.check(err)
		return nil, false
	}
	if !ok || eris.Verify(*ref, block) != nil {
		// It has been overwritten, or is damaged. Only the table may be wrong for long.
		r.remove(s)
		r.refresh()
		return nil, false
	}
	if c.hits.Add(1)%refreshHits == 0 {
		r.refresh()
	}
	return block, r.age(s.position()) > int64(r.units/4*3)
}

// check gives the cache up when reading fails: each further attempt could take
// seconds.
func (c *Cache) check(err error) {
	if err != nil {
		c.broken.Store(true)
	}
}

// Has tells whether the cache seems to have a block. It may be wrong, rarely: the
// block is not looked at.
func (c *Cache) Has(_ context.Context, ref eris.Reference, size eris.BlockSize) bool {
	if !size.Valid() {
		return false
	}
	r := c.use()
	if r == nil {
		return false
	}
	defer c.open.RUnlock()
	_, ok, err := r.find(&ref, size)
	c.check(err)
	return ok
}

// Put keeps a block, which the caller has checked against its reference and may
// change afterwards. It is written later, soon; Put waits for the disk only if
// that is slow, and not for long. The block is lost if anything fails.
func (c *Cache) Put(ref eris.Reference, block []byte) {
	size := eris.BlockSize(len(block))
	if c == nil || !size.Valid() || c.pausing() {
		return
	}
	r := c.use()
	if r == nil {
		return
	}
	_, has, err := r.find(&ref, size)
	c.open.RUnlock()
	c.check(err)
	if !has && err == nil {
		c.add(&ref, block)
	}
}

// putMissing is Put for a block that has just not been found.
func (c *Cache) putMissing(ref *eris.Reference, block []byte) {
	if !c.broken.Load() && !c.pausing() && eris.BlockSize(len(block)).Valid() {
		c.add(ref, block)
	}
}

// pausing tells whether writing has failed a short time ago.
func (c *Cache) pausing() bool {
	until := c.paused.Load()
	return until != 0 && time.Now().UnixNano() < until
}

// Close writes what has been put, for at most some seconds, and lets go of the
// file. The error is that of the last write that failed.
func (c *Cache) Close() error {
	if c == nil {
		return nil
	}
	c.once.Do(func() {}) // it is not opened any more
	c.writer.close()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		c.flush()
		c.open.Lock()
		defer c.open.Unlock()
		if c.ring != nil && !c.closed {
			c.ring.close()
		}
		c.closed = true
	}()
	timer := time.NewTimer(closePatience)
	defer timer.Stop()
	select {
	case <-closed:
	case <-timer.C: // the disk hangs
		return fmt.Errorf("cache of blocks %s: the disk does not answer", c.directory)
	}
	c.writer.mu.Lock()
	defer c.writer.mu.Unlock()
	return c.writer.failed
}
