// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"encoding/base32"
	"errors"
	"fmt"
)

// base32Encoding is that of all texts of ERIS: RFC 4648, section 6, in upper case and without
// padding. Its decoder allocates, takes line breaks and passes over spare bits, hence decodeBase32.
var base32Encoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// base32Values has the value of each character of the alphabet, and 0xff for all others.
var base32Values = func() (values [256]byte) {
	for i := range values {
		values[i] = 0xff
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") {
		values[c] = byte(i)
	}
	return values
}()

// decodeBase32 fills dst from text, which must be the one and only way to write these bytes.
func decodeBase32[T string | []byte](dst []byte, text T) error {
	if len(text) != base32Encoding.EncodedLen(len(dst)) {
		return fmt.Errorf("has %d characters of Base32 instead of %d", len(text), base32Encoding.EncodedLen(len(dst)))
	}
	var n uint64
	var invalid byte
	bits, at := 0, 0
	for i := range len(text) {
		v := base32Values[text[i]]
		invalid |= v
		n = n<<5 | uint64(v&31)
		if bits += 5; bits >= 8 {
			bits -= 8
			dst[at] = byte(n >> bits)
			at++
		}
	}
	switch {
	case invalid > 31:
		return errors.New("not upper-case Base32")
	case n&(1<<bits-1) != 0:
		return errors.New("not the canonical Base32 of its bytes")
	}
	return nil
}
