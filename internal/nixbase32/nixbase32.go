// SPDX-License-Identifier: GPL-3.0-or-later

// Package nixbase32 converts between bytes and the base-32 notation that Guix and Nix use for
// hashes: in store file names, in the NarHash field of a narinfo, and in the names of the links
// under /gnu/store/.links.
//
// The notation differs from RFC 4648 in its alphabet (the letters e, o, t and u are left out) and
// in its order: the bytes are taken as one little-endian number, and the most significant digit is
// written first. There is no padding. Every byte string has exactly one spelling, and the decoders
// here accept no other. (Guix, guix/base32.scm: bytevector->nix-base32-string; Guix,
// nix/libutil/hash.cc: printHash32.)
package nixbase32

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// alphabet holds the 32 digits in ascending order.
const alphabet = "0123456789abcdfghijklmnpqrsvwxyz"

// invalid marks, in values, the bytes that are not digits.
const invalid = 0xff

// values maps each byte to its value as a digit.
var values = func() (v [256]byte) {
	for i := range v {
		v[i] = invalid
	}
	for i := range len(alphabet) {
		v[alphabet[i]] = byte(i)
	}
	return v
}()

// encodedLen returns the number of digits that encode n bytes.
func encodedLen(n int) int { return (n*8 + 4) / 5 }

// EncodeToString returns the nix-base32 notation of src.
func EncodeToString(src []byte) string {
	digits := make([]byte, encodedLen(len(src)))
	v, bits := uint(0), 0 // that are still to be written
	for i := len(digits) - 1; i >= 0; i-- {
		if bits < 5 && len(src) > 0 {
			v |= uint(src[0]) << bits
			src, bits = src[1:], bits+8
		}
		digits[i] = alphabet[v&31]
		v, bits = v>>5, bits-5
	}
	return string(digits)
}

// Decode fills dst with the bytes that s is the nix-base32 notation of.
//
// It fails if the length of s is another one than dst needs, if s contains a character that is not
// a digit (the error names the first such character), or if the digits say more than dst can hold.
// When it fails, what dst contains is unspecified.
func Decode(dst []byte, s string) error {
	if len(s) != encodedLen(len(dst)) {
		return fmt.Errorf("nix-base32: %d digits where %d bytes need %d", len(s), len(dst), encodedLen(len(dst)))
	}
	v, bits := uint(0), 0 // that have been read
	for i := len(s) - 1; i >= 0; i-- {
		digit := values[s[i]]
		if digit == invalid {
			return digitError(s)
		}
		v |= uint(digit) << bits
		if bits += 5; bits >= 8 && len(dst) > 0 {
			dst[0] = byte(v)
			dst, v, bits = dst[1:], v>>8, bits-8
		}
	}
	if v != 0 {
		return fmt.Errorf("nix-base32: the first digit %q is too large: the excess bits must be zero", s[0])
	}
	return nil
}

// digitError names the first character of s that is not a digit.
func digitError(s string) error {
	i := strings.IndexFunc(s, func(r rune) bool { return r >= utf8.RuneSelf || values[r] == invalid })
	r, _ := utf8.DecodeRuneInString(s[i:])
	return fmt.Errorf("nix-base32: character %q at offset %d is not a digit", r, i)
}
