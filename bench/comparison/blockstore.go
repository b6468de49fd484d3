// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// blockstoreEngine is the package that came out of this: slots in files, and an index in bbolt.
// Other than the databases it verifies each block that is put, checks a checksum of each that is
// read, and keeps times of access.
type blockstoreEngine struct {
	*blockstore.Store
	directory string
	limited   bool
}

func openBlockstore(directory string, _ int) (engine, error) {
	s, err := blockstore.Open(directory, blockstore.Options{})
	return &blockstoreEngine{Store: s, directory: directory}, err
}

func (e *blockstoreEngine) put(blocks []item) error {
	references, bytes := make([]eris.Reference, len(blocks)), make([][]byte, len(blocks))
	for i, b := range blocks {
		references[i], bytes[i] = b.reference, b.bytes
	}
	return e.PutBatch(context.Background(), references, bytes)
}

// remove sees to it that the store evicts by itself from now on.
func (e *blockstoreEngine) remove([]eris.Reference) error {
	if e.limited {
		return nil
	}
	e.limited = true
	stats := e.Stats()
	if err := e.Close(); err != nil {
		return err
	}
	var err error
	e.Store, err = blockstore.Open(e.directory, blockstore.Options{MaxBytes: stats.Bytes1KiB + stats.Bytes32KiB})
	return err
}

func (e *blockstoreEngine) get(reference eris.Reference, dst []byte) ([]byte, error) {
	b, err := e.Get(context.Background(), reference, 0, dst)
	if errors.Is(err, eris.ErrNotFound) {
		return nil, nil
	}
	return b, err
}

func (e *blockstoreEngine) close() error { return e.Close() }
