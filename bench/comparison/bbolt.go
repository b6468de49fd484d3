// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"path/filepath"
	"slices"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// boltEngine is bbolt as its documentation has it: one bucket from reference to block, hashmap free
// list.
type boltEngine struct{ db *bbolt.DB }

var bucket = []byte("blocks")

func openBbolt(directory string, _ int) (engine, error) { return openBolt(directory, false) }

// openBboltNoFreelist does not write the list of free pages at each commit, and pays for it when it
// opens.
func openBboltNoFreelist(directory string, _ int) (engine, error) { return openBolt(directory, true) }

func openBolt(directory string, noFreelist bool) (engine, error) {
	db, err := bbolt.Open(filepath.Join(directory, "bolt.db"), 0o600, &bbolt.Options{
		FreelistType: bbolt.FreelistMapType, NoFreelistSync: noFreelist, InitialMmapSize: 16 << 30,
	})
	if err != nil {
		return nil, err
	}
	return boltEngine{db}, db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucket)
		return err
	})
}

func (e boltEngine) put(blocks []item) error {
	// bbolt recommends that a transaction inserts in the order of keys.
	blocks = slices.Clone(blocks)
	slices.SortFunc(blocks, func(a, b item) int { return bytes.Compare(a.reference[:], b.reference[:]) })
	return e.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		for _, block := range blocks {
			if err := b.Put(block.reference[:], block.bytes); err != nil {
				return err
			}
		}
		return nil
	})
}

func (e boltEngine) remove(references []eris.Reference) error {
	return e.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		for _, reference := range references {
			if err := b.Delete(reference[:]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (e boltEngine) get(reference eris.Reference, dst []byte) ([]byte, error) {
	var found []byte
	err := e.db.View(func(tx *bbolt.Tx) error {
		if v := tx.Bucket(bucket).Get(reference[:]); v != nil {
			found = append(dst, v...)
		}
		return nil
	})
	return found, err
}

func (e boltEngine) close() error { return e.db.Close() }
