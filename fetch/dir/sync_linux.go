// SPDX-License-Identifier: GPL-3.0-or-later

package dir

import "golang.org/x/sys/unix"

// syncFileSystem makes everything that was written to the file system of an open directory durable.
// Since Linux 5.8 it returns an error if that failed for anything written since the directory was
// opened.
func syncFileSystem(fd int) error {
	for {
		if err := unix.Syncfs(fd); err != unix.EINTR {
			return err
		}
	}
}
