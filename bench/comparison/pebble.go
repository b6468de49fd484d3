// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/sstable/block"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// pebbleEngine is Pebble without compression (blocks do not compress), with Bloom filters and a
// cache of 1 GiB.
type pebbleEngine struct {
	db    *pebble.DB
	cache *pebble.Cache
}

func openPebble(directory string, _ int) (engine, error) { return openPebbleWith(directory, false) }

// openPebbleSeparated keeps values in blob files beside the tree.
func openPebbleSeparated(directory string, _ int) (engine, error) {
	return openPebbleWith(directory, true)
}

func openPebbleWith(directory string, separated bool) (engine, error) {
	cache := pebble.NewCache(1 << 30)
	options := &pebble.Options{
		Cache:              cache,
		FormatMajorVersion: pebble.FormatNewest,
		MemTableSize:       64 << 20,
		Logger:             quiet{},
	}
	for i := range options.Levels {
		options.Levels[i].Compression = func() *sstable.CompressionProfile { return block.NoCompression }
		options.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
		options.Levels[i].FilterType = pebble.TableFilter
	}
	options.Experimental.ValueSeparationPolicy = func() pebble.ValueSeparationPolicy {
		return pebble.ValueSeparationPolicy{
			Enabled:               separated,
			MinimumSize:           512,
			MaxBlobReferenceDepth: 10,
			TargetGarbageRatio:    0.2,
		}
	}
	db, err := pebble.Open(directory, options)
	if err != nil {
		return nil, err
	}
	return pebbleEngine{db, cache}, nil
}

func (e pebbleEngine) put(blocks []item) error {
	batch := e.db.NewBatch()
	defer batch.Close()
	for _, b := range blocks {
		if err := batch.Set(b.reference[:], b.bytes, nil); err != nil {
			return err
		}
	}
	return batch.Commit(pebble.Sync)
}

func (e pebbleEngine) remove(references []eris.Reference) error {
	b := e.db.NewBatch()
	defer b.Close()
	for _, reference := range references {
		if err := b.Delete(reference[:], nil); err != nil {
			return err
		}
	}
	return b.Commit(pebble.Sync)
}

func (e pebbleEngine) get(reference eris.Reference, dst []byte) ([]byte, error) {
	v, closer, err := e.db.Get(reference[:])
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	dst = append(dst, v...)
	return dst, closer.Close()
}

func (e pebbleEngine) close() error {
	defer e.cache.Unref()
	return e.db.Close()
}

type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(format string, arguments ...any) {
	pebble.DefaultLogger.Fatalf(format, arguments...)
}
