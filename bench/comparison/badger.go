// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// badgerEngine is Badger without compression, with durable writes and values in its value log.
type badgerEngine struct{ db *badger.DB }

func openBadger(directory string, _ int) (engine, error) {
	db, err := badger.Open(badger.DefaultOptions(directory).
		WithLogger(nil).
		WithSyncWrites(true).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithDetectConflicts(false).
		WithMetricsEnabled(false).
		WithValueThreshold(512))
	if err != nil {
		return nil, err
	}
	return badgerEngine{db}, nil
}

func (e badgerEngine) put(blocks []item) error {
	b := e.db.NewWriteBatch()
	defer b.Cancel()
	for _, block := range blocks {
		if err := b.Set(block.reference[:], block.bytes); err != nil {
			return err
		}
	}
	return b.Flush()
}

func (e badgerEngine) remove(references []eris.Reference) error {
	b := e.db.NewWriteBatch()
	defer b.Cancel()
	for _, reference := range references {
		if err := b.Delete(reference[:]); err != nil {
			return err
		}
	}
	if err := b.Flush(); err != nil {
		return err
	}
	// Space of the value log comes back only if the program asks for it.
	if err := e.db.RunValueLogGC(0.3); err != nil && !errors.Is(err, badger.ErrNoRewrite) {
		return err
	}
	return nil
}

func (e badgerEngine) get(reference eris.Reference, dst []byte) ([]byte, error) {
	var found []byte
	err := e.db.View(func(tx *badger.Txn) error {
		item, err := tx.Get(reference[:])
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		} else if err != nil {
			return err
		}
		return item.Value(func(v []byte) error {
			found = append(dst, v...)
			return nil
		})
	})
	return found, err
}

func (e badgerEngine) close() error { return e.db.Close() }
