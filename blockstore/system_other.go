// SPDX-License-Identifier: GPL-3.0-or-later

//go:build unix && !linux

package blockstore

import "os"

// syncData makes the bytes of a file durable.
func syncData(f *os.File) error { return f.Sync() }

// punchHole would give the space of a part of a file back to the file system.
func punchHole(*os.File, int64, int64) error { return nil }
