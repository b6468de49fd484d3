// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import "golang.org/x/sys/unix"

// setSocketBuffers asks for send and receive buffers of the given size in bytes: beyond the limit
// of the system if we may, else as much as it grants.
func setSocketBuffers(fd uintptr, size int) {
	for option, force := range map[int]int{unix.SO_RCVBUF: unix.SO_RCVBUFFORCE, unix.SO_SNDBUF: unix.SO_SNDBUFFORCE} {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, size) != nil {
			// A smaller buffer is slower, not wrong.
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, size)
		}
	}
}
