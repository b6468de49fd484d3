// SPDX-License-Identifier: GPL-3.0-or-later

// Package items serves the blocks of store items without keeping them a second time: leaves are
// made from the files of the items when somebody asks for them. [Open] opens a [Table], which is a
// [fetch.Source], and [Table.Run] keeps it up to date.
//
// What cannot be made from a piece of a file is kept: inner nodes of files that are not small, the
// indexes of trees, and all blocks of items that ERIS-FS cannot express. So is where each leaf is,
// in 16 bytes, and of those of 32 KiB the key, so that it need not be computed again.
//
// # Promises
//
//   - What comes out has the reference that was asked for. A file that was changed, collected or
//     cannot be read yields no block, and neither does a table that was damaged.
//   - The table may be lost: it is made anew from the items, as are those parts of it that were
//     damaged. A process that is killed loses what it has read since the last part was complete.
//   - An item that was changed is read again once that was noticed.
//
// # On disk
//
// The table is some runs: files that are never changed, of doubling size, so that there are few.
// Small ones are merged, and those of which more than half is gone are written anew. A run has
//
//	blocks | entries | paths | items | footer
//
// The blocks are those that are kept, item by item. Entries are sorted; each has 8 bytes of a
// reference, and where in the paths its file is, or in the blocks it is itself. Behind the path of
// a file with blocks of 32 KiB are the keys of its leaves. The items are names, and where the
// blocks and paths of each begin. The footer has lengths and a checksum (CRC-32C) of all but the
// blocks, which name themselves.
package items
