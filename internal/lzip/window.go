// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import "golang.org/x/sys/unix"

// allocate returns n zero bytes of address space, which cost memory only where they are written to,
// so that a header that asks for a large dictionary gets nothing before there are data to fill it.
// Memory outside of the heap is given back at once, not when the garbage collector gets to it, and
// does not make it run earlier: two items in a row never hold two windows.
func allocate(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
}

func release(b []byte) {
	// It fails only for something that allocate has not returned.
	if err := unix.Munmap(b); err != nil {
		panic(err)
	}
}
