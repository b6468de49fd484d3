// SPDX-License-Identifier: GPL-3.0-or-later

// Package blockstore keeps ERIS blocks on disk. [Open] opens a [Store]; the packages below this one
// serve it.
//
// # Promises
//
//   - What goes in is a block: its hash is its reference, or it is refused.
//   - What was acknowledged is durable: it survives a crash of the program and of the machine, and
//     goes only by eviction. Blocks that many goroutines put at the same time share a commit.
//   - What comes out is what went in. Each block is checked against a checksum (CRC-32C of
//     reference and block) when it is read; one that was damaged on disk counts as absent and is
//     removed, and may be put again.
//   - With a limit, the least recently used blocks make room for new ones.
//   - Nothing but the blocks need survive: the rest can be made anew from them.
//
// The checksum finds accidents. It does not find somebody who can write to the directory, and need
// not: readers of ERIS verify each block against its reference. Nor is it what tells references
// apart, because it can be forged.
//
// # On disk
//
// A directory holds two files with nothing but blocks, one for each block size, divided into slots
// of that size; an index (bbolt) that says which reference is in which slot, and which slots are
// taken; and two files with the time of the last access to each slot. While the store is closed
// there is the checksum of the whole index, too. New blocks are written into free slots and synced,
// and then the index is committed, so that a crash at any moment leaves a consistent store. Slots
// of evicted blocks are used again, lowest first.
//
// Blocks need no more than their bytes, so the files with blocks can be as large as the limit. When
// the mix of block sizes shifts, the space of slots that are not soon to be used again is given
// back to the file system by punching holes (on Linux, where the file system can); without that,
// the two files together could come to twice the limit. The index takes some 100 bytes per block
// and never shrinks, and the access times 4 bytes per slot.
//
// # When things go wrong
//
// A full disk, and any other failure to write, fails the calls of Put that it concerns; what was
// stored stays readable, and later calls try again. If the index was possibly not written although
// its commit had begun, the store takes no more blocks until it is opened anew.
//
// bbolt does not checksum the index. Therefore each entry has a checksum with its key, and before
// anything is written the whole index is checked. Damage that is found then or later becomes an
// error that wraps [ErrDamaged], and the index loses its name. Because blocks name themselves by
// their hash, [Rebuild] makes a new one from the blocks alone. docs/blockstore.md has the two kinds
// of damage that are not found.
package blockstore
