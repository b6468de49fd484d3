// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"golang.org/x/sys/unix"
)

const haveVectors = true

// readVector reads into several pieces of memory with one system call. Again says that nothing is
// there yet.
func readVector(fd uintptr, vector [][]byte) (n int, again bool, err error) {
	for {
		n, err = unix.Readv(int(fd), vector)
		switch err {
		case nil:
			return n, false, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, true, nil
		default:
			return 0, false, err
		}
	}
}

// SetSocketBuffers asks for send and receive buffers of the given size in bytes: beyond the limit
// of the system if we may, else as much as it grants.
func SetSocketBuffers(fd uintptr, size int) {
	for option, force := range map[int]int{unix.SO_RCVBUF: unix.SO_RCVBUFFORCE, unix.SO_SNDBUF: unix.SO_SNDBUFFORCE} {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, size) != nil {
			// A smaller buffer is slower, not wrong.
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, size)
		}
	}
}
