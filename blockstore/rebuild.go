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
)

// Rebuild makes a new index for the store in a directory from its blocks, in place of the old one if there is one, and
// returns how many blocks it found. It reads and hashes all blocks, on all cores. The store must not be open: else the error
// wraps [ErrLocked]. Until the new index is complete and durable, the old one is left as it is.
//
// No block is pinned afterwards. Bytes that were damaged on disk are kept too, under the name that they have now; nobody asks
// for that, so they go by eviction. Blocks that were evicted and not yet overwritten are back.
func Rebuild(ctx context.Context, directory string) (blocks int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("rebuilding block store %q: %w", directory, err)
		}
	}()
	lock, err := lockDirectory(directory)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	path := filepath.Join(directory, indexName+".new")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 1, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return 0, err
	}
	state := state{pin: 1}
	for c := range classes {
		if err == nil {
			state.blocks[c], err = rebuildClass(ctx, db, directory, c)
		}
	}
	if err == nil {
		err = db.Update(func(tx *bbolt.Tx) error {
			for _, name := range [][]byte{blocksBucket, slotsBucket, storeBucket} {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return tx.Bucket(storeBucket).Put(stateKey, state.append(nil))
		})
	}
	if err = errors.Join(err, db.Close()); err != nil {
		return 0, errors.Join(err, os.Remove(path))
	}
	if err := installIndex(directory); err != nil {
		return 0, err
	}
	return state.blocks[class1KiB] + state.blocks[class32KiB], nil
}

// rebuildClass enters the blocks of one slab into a new index.
func rebuildClass(ctx context.Context, db *bbolt.DB, directory string, c class) (blocks int64, err error) {
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
		taken := new(bitmap)
		var found []placed
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
			found = append(found, sumBlocks(slab[:n-n%c.size()], c, first)...)
		}
		slices.SortFunc(found, func(a, b placed) int { return bytes.Compare(a.ref[:], b.ref[:]) })
		if err := db.Update(func(tx *bbolt.Tx) error {
			bucket, err := tx.CreateBucketIfNotExists(blocksBucket)
			if err != nil {
				return err
			}
			for _, p := range found {
				if bucket.Get(p.ref[:]) != nil {
					continue // the same block in an earlier slot
				}
				if err := bucket.Put(p.ref[:], record{location: p.location}.append(nil)); err != nil {
					return err
				}
				slot := p.location.slot()
				taken[slot%slotsPerChunk/64] |= 1 << (slot % 64)
				blocks++
			}
			if bucket, err = tx.CreateBucketIfNotExists(slotsBucket); err != nil {
				return err
			}
			return bucket.Put(slotKey(c, chunk), taken.append(nil))
		}); err != nil {
			return 0, err
		}
		if end {
			return blocks, nil
		}
	}
}

// sumBlocks returns the references and locations of neighbouring blocks, the first of which is in the given slot. It leaves out
// those that are nothing but zeros: such are holes.
func sumBlocks(slab []byte, c class, first int) []placed {
	all := make([]placed, len(slab)/c.size())
	var group sync.WaitGroup
	workers := runtime.GOMAXPROCS(0)
	for worker := range workers {
		group.Go(func() {
			zeros := make([]byte, c.size())
			for i := worker; i < len(all); i += workers {
				block := slab[i*c.size() : (i+1)*c.size()]
				if bytes.Equal(block, zeros) {
					continue
				}
				r := &request{ref: eris.Sum(block)}
				all[i] = placed{r, makeLocation(checksum(r.ref, block), c, uint32(first+i))}
			}
		})
	}
	group.Wait()
	return slices.DeleteFunc(all, func(p placed) bool { return p.request == nil })
}
