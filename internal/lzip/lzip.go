// SPDX-License-Identifier: GPL-3.0-or-later

// Package lzip decompresses the lzip format, in which substitute servers offer the smallest
// archives, and compresses. Start with [NewReader] and [NewWriter].
//
// The format is that of the lzip manual, "File format", and of the Internet draft draft-diaz-lzip:
// members one after the other, each with a header, an LZMA stream with an end marker, and a trailer
// with a CRC and sizes. Everything in them is checked. Data that follow the last member and are not
// a member themselves are an error, as they are for Guix (guix/utils.scm: decompressed-port, by way
// of lzlib).
package lzip

import (
	"errors"
	"fmt"
)

const (
	headerSize  = 6
	trailerSize = 20

	minDictionary = 1 << 12
	maxDictionary = 1 << 29
)

var (
	errFormat     = errors.New("lzip data invalid")
	errDictionary = errors.New("lzip dictionary too large")
	errClosed     = errors.New("lzip reader is closed")
)

// formatError makes an error that is errFormat.
func formatError(format string, a ...any) error {
	return fmt.Errorf("%w: %s", errFormat, fmt.Sprintf(format, a...))
}

// magic are the first bytes of a member, its version included.
const magic = "LZIP\x01"

// parseHeader returns the dictionary size, in bytes, that a header of six bytes gives. The format
// has versions 0 and 1; version 0 has not been made since 2010 and is not supported.
func parseHeader(h [headerSize]byte) (dictionary int, err error) {
	if string(h[:4]) != magic[:4] {
		return 0, formatError("no member where one must be")
	}
	if h[4] != magic[4] {
		return 0, formatError("version %d instead of 1", h[4])
	}
	dictionary, ok := parseDictionary(h[5])
	if !ok {
		return 0, formatError("dictionary size code %#02x", h[5])
	}
	return dictionary, nil
}

// parseDictionary decodes a dictionary size: the low five bits are the exponent of a power of two,
// from which the high three bits take away so many sixteenths.
func parseDictionary(code byte) (size int, ok bool) {
	exponent := code & 31
	if exponent < 12 || exponent > 29 {
		return 0, false
	}
	size = 1 << exponent
	size -= size / 16 * int(code>>5)
	return size, size >= minDictionary
}
