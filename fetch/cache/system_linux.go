// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"os"

	"golang.org/x/sys/unix"
)

// adviseWillNeed has the kernel read a part of a file ahead.
func adviseWillNeed(f *os.File, offset, length int64) {
	unix.Fadvise(int(f.Fd()), offset, length, unix.FADV_WILLNEED)
}

// mostReserve bounds what is left free of a large file system, in bytes.
const mostReserve = 512 << 20

// roomy reports whether the file system of a file is less than nine tenths full, or has 512 MiB of
// room: a cache must not take the last of it from what is to be kept.
func roomy(f *os.File) bool {
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
		return true // writing tells
	}
	free := s.Bavail * uint64(s.Bsize)
	return free >= min(s.Blocks/10*uint64(s.Bsize), mostReserve)
}
