// SPDX-License-Identifier: GPL-3.0-or-later

package decompress

import (
	"bufio"
	"io"

	"github.com/xi2/xz"
)

// An xzReader decompresses the .xz format (https://tukaani.org/xz/xz-file-format.txt). All of its
// blocks share one dictionary, which is made as large as the first header says, if that is not
// refused, and takes memory as it is filled.
type xzReader struct {
	in *bufio.Reader
	z  *xz.Reader // nil before the first read
}

func (x *xzReader) Read(p []byte) (n int, err error) {
	if x.z == nil {
		x.z, err = xz.NewReader(x.in, maxWindow)
	}
	if err == nil {
		n, err = x.z.Read(p)
	}
	if err == xz.ErrBuf { // more is wanted than there is
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
