// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/binary"
	"math/rand/v2"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// An engine keeps blocks in a directory by one of the designs compared.
type engine interface {
	// put stores blocks and returns when they would survive a loss of power.
	put(blocks []item) error
	// remove removes blocks, as eviction does.
	remove(references []eris.Reference) error
	// get returns a block, in dst or in memory of its own, and nil if it is absent.
	get(reference eris.Reference, dst []byte) ([]byte, error)
	close() error
}

// item is a block and its reference.
type item struct {
	reference eris.Reference
	bytes     []byte
}

// engines has a constructor for each design. The size is that of the blocks to come, for engines
// that are tuned by it.
var engines = map[string]func(directory string, size int) (engine, error){
	"bbolt":            openBbolt,
	"bbolt-nofreelist": openBboltNoFreelist,
	"pebble":           openPebble,
	"pebble-separated": openPebbleSeparated,
	"badger":           openBadger,
	"blockstore":       openBlockstore,
}

// content returns the bytes of the i-th block: noise that differs from block to block and costs
// little to make, so that the harness does not show in the numbers.
func content(i, size int) []byte {
	b := make([]byte, size)
	offset := rand.New(rand.NewPCG(uint64(i), 1)).IntN(len(noise) - size)
	copy(b, noise[offset:])
	binary.BigEndian.PutUint64(b, uint64(i))
	return b
}

var noise = func() []byte {
	b := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()
