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
// docs/blockstore.md says what is on disk, and what happens when things go wrong.
package blockstore
