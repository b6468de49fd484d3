// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// Rebuild makes a new index for the store in a directory from its blocks, in place of the old one
// if there is one, and returns how many blocks it found. It reads and hashes all blocks, on all
// cores. The store must not be open: else the error wraps [files.ErrLocked]. Until the new index is
// complete and durable, the old one is left as it is.
//
// Bytes that were damaged on disk are kept too, under the name that they have now; nobody asks for
// that, so they go by eviction. Blocks that were evicted and not yet overwritten are back.
func Rebuild(ctx context.Context, directory string) (blocks int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("rebuilding block store %q: %w", directory, err)
		}
	}()
	lock, err := files.Lock(filepath.Join(directory, lockName), 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	s, err := makeIndex(directory, func(db *bbolt.DB) (s state, err error) {
		for c := range classes {
			if s.blocks[c], err = enterSlab(ctx, db, directory, c); err != nil {
				return s, err
			}
		}
		return s, nil
	})
	return s.blocks[class1KiB] + s.blocks[class32KiB], err
}

// enterSlab enters the blocks of one slab into a new index.
func enterSlab(ctx context.Context, db *bbolt.DB, directory string, c class) (blocks int64, err error) {
	name, _ := slabNames(c)
	f, err := os.Open(filepath.Join(directory, name))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	defer f.Close()
	slab := make([]byte, slotsPerChunk*c.size()/8) // an eighth of a chunk at a time
	for chunk := 0; ; chunk++ {
		var found []found
		end := false
		for part := 0; part < 8 && !end; part++ {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			first := chunk*slotsPerChunk + part*slotsPerChunk/8
			n, err := f.ReadAt(slab, int64(first)*int64(c.size()))
			if end = err == io.EOF; err != nil && !end {
				return 0, err
			}
			found = append(found, findBlocks(slab[:n-n%c.size()], c, first)...)
		}
		n, err := enterChunk(db, c, chunk, found)
		if blocks += n; err != nil || end {
			return blocks, err
		}
	}
}

// found is a block in a slab.
type found struct {
	ref      eris.Reference
	location location
}

// enterChunk enters the blocks of a chunk of slots. It returns how many there are that have not
// been entered before.
func enterChunk(db *bbolt.DB, c class, chunk int, all []found) (blocks int64, err error) {
	slices.SortFunc(all, func(a, b found) int { return bytes.Compare(a.ref[:], b.ref[:]) })
	err = db.Update(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(blocksBucket)
		taken := new(bitmap)
		for _, f := range all {
			if bucket.Get(f.ref[:]) != nil {
				continue // the same block in an earlier slot
			}
			if err := bucket.Put(f.ref[:], appendLocation(nil, &f.ref, f.location)); err != nil {
				return err
			}
			taken.set(f.location.slot())
			blocks++
		}
		key := slotKey(c, chunk)
		return tx.Bucket(slotsBucket).Put(key, taken.append(nil, key))
	})
	return blocks, err
}

// findBlocks returns the references and locations of neighbouring blocks, the first of which is in
// the given slot. It leaves out those that are nothing but zeros: such are holes.
func findBlocks(slab []byte, c class, first int) (all []found) {
	blocks := slices.Collect(slices.Chunk(slab, c.size()))
	refs := make([]eris.Reference, len(blocks))
	share := max(1, (len(blocks)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0))
	var group sync.WaitGroup
	for i := 0; i < len(blocks); i += share {
		end := min(i+share, len(blocks))
		group.Go(func() { eris.SumAll(refs[i:end], blocks[i:end]) })
	}
	group.Wait()
	zeros := make([]byte, c.size())
	for i, block := range blocks {
		if !bytes.Equal(block, zeros) {
			all = append(all, found{refs[i], makeLocation(checksum(refs[i][:], block), c, uint32(first+i))})
		}
	}
	return all
}
