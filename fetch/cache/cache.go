// SPDX-License-Identifier: GPL-3.0-or-later

// Package cache keeps blocks that have been fetched on disk, encrypted as they came, so that a
// substitution that was killed and is tried again fetches only what is missing. Start with [Open];
// a Cache is a near member of a pool.
//
// All processes that open one directory share one file of bounded size, and see each other's blocks
// at once. In it the blocks lie one behind the other, 1 KiB or 32 KiB each, and the oldest are
// overwritten by the newest; a block that is used when its turn is near is written again. Beside
// them there is a hash table of 8 bytes per entry, so that opening costs the same for any size, a
// miss is one read of 512 bytes, of a part of the file that the kernel keeps in memory, and no
// memory of the process grows with the cache.
//
// Nothing in the file is trusted: whoever gets a block verifies it, so that neither a process that
// is killed at any instant, nor a power failure, nor two writers of one place can do worse than
// lose blocks. Nothing is flushed to the disk: what was written before a process was killed is
// there for the next, what was written before a power failure perhaps.
//
// The cache never fails a fetch. If the disk is full, slow or damaged, or the directory cannot be
// used, blocks are not kept, and not found.
package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// Cache keeps blocks in a directory. It is a [fetch.Source] of them, and takes more by Keep. It is
// safe for concurrent use, and so is the directory. Close must be called at the end.
type Cache struct {
	*fetch.Workers
	directory string
	maxBytes  int64
	onFailure func(error)

	once   sync.Once
	ring   *ring       // nil before it is opened, and where it could not be
	broken atomic.Bool // reading has failed, or it is closed
	hits   atomic.Uint64
	write  sync.Mutex // held by who writes
	buffer []byte     // under write
}

const (
	// mostBatch bounds the blocks that are written at a time, in bytes.
	mostBatch = 1 << 20
	// readers is how many blocks are read at a time.
	readers = 8
	// closeWait is how long Close waits for the disk.
	closeWait = 2 * time.Second
	// refreshHits is after how many hits the cache looks how much other processes have written.
	refreshHits = 256
)

// Open returns the cache in a directory, for blocks of at most maxBytes bytes together, which is
// also about the greatest size of the file; at least 1 MiB. Nothing is opened or created before it
// is used. If that fails, because of the file system, or because others than the user of this
// process could write there, onFailure is called with the error unless it is nil, and the cache
// stays empty. If there is a cache of another size it is given up.
func Open(directory string, maxBytes int64, onFailure func(error)) *Cache {
	c := &Cache{directory: directory, maxBytes: maxBytes, onFailure: onFailure}
	c.Workers = fetch.NewWorkers("cache:"+directory, readers, c.get)
	return c
}

func (c *Cache) use() *ring {
	c.once.Do(func() {
		var err error
		if c.ring, err = openRing(c.directory, c.maxBytes); err != nil && c.onFailure != nil {
			c.onFailure(fmt.Errorf("cache of blocks %s: %w", c.directory, err))
		}
	})
	if c.broken.Load() {
		return nil
	}
	return c.ring
}

// find returns the ring and where it has a block, perhaps. The ring is nil if there is nothing.
func (c *Cache) find(ref *eris.Reference, size eris.BlockSize) (r *ring, position uint64) {
	if r = c.use(); r == nil || !size.Valid() {
		return nil, 0
	}
	position, ok, err := r.find(ref, size)
	if c.check(err); !ok {
		return nil, 0
	}
	return r, position
}

// check gives the cache up when reading fails: each further attempt could take seconds.
func (c *Cache) check(err error) {
	if err != nil {
		c.broken.Store(true)
	}
}

// Has reports whether the cache seems to have a block. It may be wrong, rarely: the block is not
// looked at.
func (c *Cache) Has(_ context.Context, ref eris.Reference, size eris.BlockSize) bool {
	r, _ := c.find(&ref, size)
	return r != nil
}

// get reads a block for one of the workers. It may be another one, where it has been overwritten or
// damaged.
func (c *Cache) get(_ context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	r, position := c.find(&ref, size)
	if r == nil {
		return nil, eris.ErrNotFound
	}
	block := dst[:size]
	ok, err := r.read(block, position)
	old := r.age(position) > int64(r.units/4*3)
	if c.hits.Add(1)%refreshHits == 0 {
		r.refresh()
	}
	if c.check(err); err != nil || !ok {
		return nil, eris.ErrNotFound
	}
	if old && eris.Verify(ref, block) == nil {
		c.Keep(context.Background(), []eris.Reference{ref}, [][]byte{block})
	}
	return block, nil
}

// Keep writes blocks, which the caller has checked against their references. Those that are lost if
// it fails are the newest. Errors are those of the file system.
func (c *Cache) Keep(_ context.Context, refs []eris.Reference, blocks [][]byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	r := c.use()
	if r == nil {
		return nil
	}
	most := max(int(min(mostBatch, c.maxBytes/32)), int(eris.BlockSize32KiB))
	for len(blocks) > 0 {
		c.buffer = c.buffer[:0]
		n := 0
		for ; n < len(blocks) && (n == 0 || len(c.buffer)+len(blocks[n]) <= most); n++ {
			if !eris.BlockSize(len(blocks[n])).Valid() {
				return fmt.Errorf("block %v has %d bytes", refs[n], len(blocks[n]))
			}
			c.buffer = append(c.buffer, blocks[n]...)
		}
		if err := r.write(refs[:n], blocks[:n], c.buffer); err != nil {
			return fmt.Errorf("cache of blocks %s: %w", c.directory, err)
		}
		refs, blocks = refs[n:], blocks[n:]
	}
	return nil
}

// MakeRoom gives the room of all blocks back if they are on the file system of a directory, and
// keeps none any more. It reports whether there was some.
func (c *Cache) MakeRoom(directory string) bool {
	c.write.Lock()
	defer c.write.Unlock()
	r := c.use()
	var here, there unix.Stat_t
	if r == nil || errors.Join(unix.Fstat(int(r.file.Fd()), &here), unix.Stat(directory, &there)) != nil || here.Dev != there.Dev {
		return false
	}
	c.broken.Store(true)
	return here.Size > r.data && r.file.Truncate(r.data) == nil
}

// Close ends all requests, waits for the disk for at most some seconds, and lets go of the file.
func (c *Cache) Close() error {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		c.Workers.Close()
		c.once.Do(func() {}) // it is not opened any more; waits for the disk if it is being opened
		c.write.Lock()
		defer c.write.Unlock()
		c.broken.Store(true)
		if c.ring != nil {
			c.ring.file.Close()
		}
	}()
	select {
	case <-closed:
		return nil
	case <-time.After(closeWait):
		return fmt.Errorf("cache of blocks %s: the disk does not answer", c.directory)
	}
}
