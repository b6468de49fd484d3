// SPDX-License-Identifier: GPL-3.0-or-later

//go:build amd64 && !purego && gc

package eris

// xorRoutines returns every routine that this processor can run, not only the one that it would choose.
func xorRoutines() []xorRoutine {
	routines := []xorRoutine{{"chosen", xorKeyStream}}
	if useAVX2 {
		routines = append(routines, xorRoutine{"AVX2", func(dst, src []byte, key *Key, level byte) {
			state := initialState(key, level)
			xorKeyStreamAVX2(&dst[0], &src[0], len(src)/strideAVX2, &state)
		}})
	}
	if useAVX512 {
		routines = append(routines, xorRoutine{"AVX-512", func(dst, src []byte, key *Key, level byte) {
			state := initialState(key, level)
			xorKeyStreamAVX512(&dst[0], &src[0], len(src)/strideAVX512, &state)
		}})
	}
	return routines
}
