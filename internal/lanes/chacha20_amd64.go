// SPDX-License-Identifier: GPL-3.0-or-later

//go:build amd64 && !purego && gc

package lanes

import "encoding/binary"

// Bytes that one turn of each routine makes: 8 and 16 blocks of the cipher. Both divide stride.
const (
	strideAVX2   = 8 * 64
	strideAVX512 = 16 * 64
)

// xorAVX2 writes src xor the key stream to dst, for strides of 512 bytes. State is the initial
// state of the cipher; its counter is taken as the start.
//
//go:noescape
func xorAVX2(dst, src *byte, strides int, state *[16]uint32)

// xorAVX512 is the same for strides of 1024 bytes.
//
//go:noescape
func xorAVX512(dst, src *byte, strides int, state *[16]uint32)

// initialState returns the state of RFC 8439, section 2.3, with the counter at 0.
func initialState(key *[32]byte, nonce byte) [16]uint32 {
	return [16]uint32{
		0x61707865, 0x3320646e, 0x79622d32, 0x6b206574,
		binary.LittleEndian.Uint32(key[0:]), binary.LittleEndian.Uint32(key[4:]),
		binary.LittleEndian.Uint32(key[8:]), binary.LittleEndian.Uint32(key[12:]),
		binary.LittleEndian.Uint32(key[16:]), binary.LittleEndian.Uint32(key[20:]),
		binary.LittleEndian.Uint32(key[24:]), binary.LittleEndian.Uint32(key[28:]),
		0, uint32(nonce), 0, 0,
	}
}

// xorVector does the work of XORKeyStream, whose checks have been made, if this processor can; else
// it returns false and does nothing.
func xorVector(dst, src []byte, key *[32]byte, nonce byte) bool {
	if !useAVX2 {
		return false
	}
	state := initialState(key, nonce)
	if useAVX512 {
		xorAVX512(&dst[0], &src[0], len(src)/strideAVX512, &state)
	} else {
		xorAVX2(&dst[0], &src[0], len(src)/strideAVX2, &state)
	}
	return true
}
