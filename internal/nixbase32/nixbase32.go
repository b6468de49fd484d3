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
//
// Start with [EncodeToString] and [DecodeString]; use [AppendEncode] and [Decode] where no memory
// should be allocated.
package nixbase32

import (
	"fmt"
	"slices"
	"unicode/utf8"
)

// alphabet holds the 32 digits in ascending order.
const alphabet = "0123456789abcdfghijklmnpqrsvwxyz"

// invalid marks, in values, the bytes that are not digits. Its high bit is set, unlike that of any
// digit, so that several digits can be checked at once.
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

// Eight digits carry exactly five bytes, so both directions work on such groups, from the end of
// the text and the start of the bytes, where the number is least significant.
const (
	groupDigits = 8
	groupBytes  = 5
)

// EncodedLen returns the number of digits that encode n bytes. n must not be negative.
func EncodedLen(n int) int {
	return n/groupBytes*groupDigits + (n%groupBytes*8+4)/5
}

// EncodeToString returns the nix-base32 notation of src.
func EncodeToString(src []byte) string {
	// The usual subject is a SHA-256 digest; it fits the array, which stays on the stack.
	var buf [64]byte
	return string(AppendEncode(buf[:0], src))
}

// AppendEncode appends the nix-base32 notation of src to dst and returns the extended slice. src
// and the free capacity of dst must not overlap.
func AppendEncode(dst, src []byte) []byte {
	start := len(dst)
	n := EncodedLen(len(src))
	dst = slices.Grow(dst, n)[:start+n]
	out := dst[start:]
	for len(src) >= groupBytes {
		v := uint64(src[0]) | uint64(src[1])<<8 | uint64(src[2])<<16 | uint64(src[3])<<24 | uint64(src[4])<<32
		src = src[groupBytes:]
		g := (*[groupDigits]byte)(out[len(out)-groupDigits:])
		g[7] = alphabet[v&31]
		g[6] = alphabet[v>>5&31]
		g[5] = alphabet[v>>10&31]
		g[4] = alphabet[v>>15&31]
		g[3] = alphabet[v>>20&31]
		g[2] = alphabet[v>>25&31]
		g[1] = alphabet[v>>30&31]
		g[0] = alphabet[v>>35&31]
		out = out[:len(out)-groupDigits]
	}
	var v uint64
	for i, b := range src {
		v |= uint64(b) << (8 * i)
	}
	for i := len(out) - 1; i >= 0; i-- {
		out[i] = alphabet[v&31]
		v >>= 5
	}
	return dst
}

// DecodeString returns the bytes that s is the nix-base32 notation of.
//
// It fails if the length of s is not [EncodedLen] of any number of bytes, if s contains a character
// that is not a digit (the error names the first such character), or if the digits say more than
// the bytes can hold.
func DecodeString(s string) ([]byte, error) {
	dst := make([]byte, len(s)*groupBytes/groupDigits)
	if EncodedLen(len(dst)) != len(s) {
		return nil, fmt.Errorf("nix-base32: no byte string is written with %d digits", len(s))
	}
	if err := Decode(dst, s); err != nil {
		return nil, err
	}
	return dst, nil
}

// Decode fills dst with the bytes that s is the nix-base32 notation of. The length of s must be
// exactly EncodedLen(len(dst)).
//
// It fails if the length is another one, if s contains a character that is not a digit (the error
// names the first such character), or if the digits say more than dst can hold. When it fails, what
// dst contains is unspecified.
func Decode(dst []byte, s string) error {
	if len(s) != EncodedLen(len(dst)) {
		return fmt.Errorf("nix-base32: %d digits where %d bytes need %d", len(s), len(dst), EncodedLen(len(dst)))
	}
	whole := s
	for len(dst) >= groupBytes {
		g := s[len(s)-groupDigits:]
		s = s[:len(s)-groupDigits]
		d0, d1, d2, d3 := values[g[7]], values[g[6]], values[g[5]], values[g[4]]
		d4, d5, d6, d7 := values[g[3]], values[g[2]], values[g[1]], values[g[0]]
		if (d0|d1|d2|d3|d4|d5|d6|d7)&0x80 != 0 {
			return digitError(whole)
		}
		v := uint64(d0) | uint64(d1)<<5 | uint64(d2)<<10 | uint64(d3)<<15 |
			uint64(d4)<<20 | uint64(d5)<<25 | uint64(d6)<<30 | uint64(d7)<<35
		dst[0], dst[1], dst[2], dst[3], dst[4] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32)
		dst = dst[groupBytes:]
	}
	var v uint64
	for i := range len(s) {
		d := values[s[i]]
		if d == invalid {
			return digitError(whole)
		}
		v = v<<5 | uint64(d)
	}
	for i := range dst {
		dst[i] = byte(v)
		v >>= 8
	}
	if v != 0 {
		return fmt.Errorf("nix-base32: the first digit %q is too large: the excess bits must be zero", whole[0])
	}
	return nil
}

// digitError reports the first character of s that is not a digit.
func digitError(s string) error {
	for i := range len(s) {
		if values[s[i]] == invalid {
			r, _ := utf8.DecodeRuneInString(s[i:])
			return fmt.Errorf("nix-base32: character %q at offset %d is not a digit", r, i)
		}
	}
	return nil
}
