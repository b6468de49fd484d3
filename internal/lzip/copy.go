// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

// slack is how many bytes copyMatch may read and write beyond the end of a match.
const slack = 16

// copyMatch copies n bytes, at least one, from buf[from:] to buf[pos:], as a loop over single bytes
// would: where the two overlap, what was written is read again. It writes up to slack bytes more,
// which have no meaning.
//
// buf must have slack bytes after both, and from must differ from pos; if it is above pos, which
// happens in a ring, then by slack at least.
func copyMatch(buf []byte, pos, from, n int) {
	dst := buf[pos : pos+n+slack]
	src := buf[from : from+n+slack]
	switch gap := pos - from; {
	case uint(gap) >= 16: // or negative
		for {
			*(*[16]byte)(dst) = *(*[16]byte)(src)
			n -= 16
			if n <= 0 {
				return
			}
			dst, src = dst[16:], src[16:]
		}
	case gap < 8:
		// Write a whole number of periods, eight bytes at least, and go on with that as the period.
		k := 0
		for k < 8 {
			for i := range gap {
				dst[k+i] = src[i]
			}
			k += gap
		}
		n -= k
		if n <= 0 {
			return
		}
		dst = dst[k:]
	}
	for {
		*(*[8]byte)(dst) = *(*[8]byte)(src)
		n -= 8
		if n <= 0 {
			return
		}
		dst, src = dst[8:], src[8:]
	}
}
