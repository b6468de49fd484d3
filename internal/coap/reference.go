// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"encoding/base32"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

const (
	rawReferenceSize  = len(eris.Reference{})
	textReferenceSize = 52
	base32Alphabet    = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
)

// base32Values has the value of each character of the alphabet, and 0xff for all others. The
// decoder of encoding/base32 allocates, takes line breaks and passes over spare bits, hence this
// one.
var base32Values = func() (values [256]byte) {
	for i := range values {
		values[i] = 0xff
	}
	for i := range len(base32Alphabet) {
		values[base32Alphabet[i]] = byte(i)
	}
	return values
}()

// parseQuery reads the reference of a block from the value of Uri-Query in a GET: either its 32
// bytes, or the 52 characters of their Base32 in upper case without padding, whose four spare bits
// must be zero. The length tells them apart.
func parseQuery(value []byte) (ref eris.Reference, ok bool) {
	switch len(value) {
	case rawReferenceSize:
		return eris.Reference(value), true
	case textReferenceSize:
	default:
		return ref, false
	}
	var invalid byte
	// Eight characters are five bytes; 48 characters are 30 bytes, and the last four are two bytes
	// and four spare bits.
	for group := range 6 {
		var n uint64
		for _, c := range value[group*8 : group*8+8] {
			v := base32Values[c]
			invalid |= v
			n = n<<5 | uint64(v&31)
		}
		at := ref[group*5 : group*5+5]
		at[0], at[1], at[2], at[3], at[4] = byte(n>>32), byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	}
	var n uint32
	for _, c := range value[48:] {
		v := base32Values[c]
		invalid |= v
		n = n<<5 | uint32(v&31)
	}
	ref[30], ref[31] = byte(n>>12), byte(n>>4)
	if invalid > 31 || n&15 != 0 {
		return eris.Reference{}, false
	}
	return ref, true
}

var base32Text = base32.StdEncoding.WithPadding(base32.NoPadding)

// appendReferenceText appends the 52 characters of Base32.
func appendReferenceText(dst []byte, ref *eris.Reference) []byte {
	return base32Text.AppendEncode(dst, ref[:])
}
