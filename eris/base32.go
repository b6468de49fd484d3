// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"errors"
	"fmt"
)

// base32Alphabet is that of all texts of ERIS: RFC 4648, section 6, in upper case and without
// padding. The decoder of encoding/base32 allocates, takes line breaks and passes over spare bits,
// hence this one.
const base32Alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"

// base32Values has the value of each character of the alphabet, and 0xff for all others.
var base32Values = func() (values [256]byte) {
	for i := range values {
		values[i] = 0xff
	}
	for i := range len(base32Alphabet) {
		values[base32Alphabet[i]] = byte(i)
	}
	return values
}()

// base32Length returns how many characters n bytes take.
func base32Length(n int) int { return (8*n + 4) / 5 }

// appendBase32 appends the text of src. The bits that the last character has to spare are zero.
func appendBase32(dst, src []byte) []byte {
	for ; len(src) >= 5; src = src[5:] { // five bytes are eight characters
		n := uint64(src[0])<<32 | uint64(src[1])<<24 | uint64(src[2])<<16 | uint64(src[3])<<8 | uint64(src[4])
		dst = append(dst,
			base32Alphabet[n>>35&31], base32Alphabet[n>>30&31], base32Alphabet[n>>25&31], base32Alphabet[n>>20&31],
			base32Alphabet[n>>15&31], base32Alphabet[n>>10&31], base32Alphabet[n>>5&31], base32Alphabet[n&31])
	}
	var n uint64
	for i, b := range src {
		n |= uint64(b) << (32 - 8*i)
	}
	for i := range base32Length(len(src)) {
		dst = append(dst, base32Alphabet[n>>(35-5*i)&31])
	}
	return dst
}

// decodeBase32 fills dst from text, which must be the one and only way to write these bytes.
func decodeBase32[T string | []byte](dst []byte, text T) error {
	if len(text) != base32Length(len(dst)) {
		return fmt.Errorf("has %d characters of Base32 instead of %d", len(text), base32Length(len(dst)))
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
