// SPDX-License-Identifier: GPL-3.0-or-later

//go:build amd64 && !purego && gc

package chacha20

// xorRoutines returns every routine that this processor can run, not only the one that it would
// choose.
func xorRoutines() []xorRoutine {
	routines := []xorRoutine{{"chosen", XORKeyStream}}
	if useAVX2 {
		routines = append(routines, xorRoutine{"AVX2", func(dst, src []byte, key *[32]byte, nonce byte) {
			state := initialState(key, nonce)
			xorAVX2(&dst[0], &src[0], len(src)/strideAVX2, &state)
		}})
	}
	if useAVX512 {
		routines = append(routines, xorRoutine{"AVX-512", func(dst, src []byte, key *[32]byte, nonce byte) {
			state := initialState(key, nonce)
			xorAVX512(&dst[0], &src[0], len(src)/strideAVX512, &state)
		}})
	}
	return routines
}
