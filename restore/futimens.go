// SPDX-License-Identifier: GPL-3.0-or-later

package restore

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// futimens sets the access and modification times of an open file. x/sys/unix has the system call
// only with a name.
func futimens(fd int, times *[2]unix.Timespec) error {
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
