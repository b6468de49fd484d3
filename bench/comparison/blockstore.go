// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// blockstoreEngine is the package that came out of this: slots in files, and an index in bbolt.
// Other than the databases it verifies each block that is put, checks a checksum of each that is
// read, and keeps times of access.
type blockstoreEngine struct {
	*blockstore.Store
	directory string
	size      eris.BlockSize
	limited   bool
}

func openBlockstore(directory string, size int) (engine, error) {
	s, err := blockstore.Open(directory, blockstore.Options{})
	return &blockstoreEngine{Store: s, directory: directory, size: eris.BlockSize(size)}, err
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
	e.Store, err = blockstore.Open(e.directory, blockstore.Options{MaxBytes: stats.Bytes})
	return err
}

func (e *blockstoreEngine) get(reference eris.Reference, dst []byte) ([]byte, error) {
	if cap(dst) < int(e.size) {
		dst = make([]byte, 0, e.size)
	}
	r := fetch.Request{Pair: eris.Pair{Reference: reference}, Size: e.size, Dst: dst[:0], Done: func(*fetch.Request) {}}
	e.Start(&r) // is done when it returns
	if errors.Is(r.Err, eris.ErrNotFound) {
		return nil, nil
	}
	return r.Block, r.Err
}

func (e *blockstoreEngine) close() error { return e.Close() }
