// SPDX-License-Identifier: GPL-3.0-or-later

//go:build amd64 && !purego && gc

package blake2lanes

// sumRoutines returns every routine that this processor can run, not only the one that it would
// choose, and has them do any number of blocks themselves.
func sumRoutines() []sumRoutine {
	routines := []sumRoutine{{"chosen", Sum256}, {"plain", sumPlain}}
	if useAVX2 {
		routines = append(routines, sumRoutine{"AVX2", func(sums [][32]byte, blocks [][]byte, key *[32]byte) {
			sumLanes(lanesAVX2, 1, sums, blocks, key)
		}})
	}
	if useAVX512 {
		routines = append(routines, sumRoutine{"AVX-512", func(sums [][32]byte, blocks [][]byte, key *[32]byte) {
			sumLanes(lanesAVX512, 1, sums, blocks, key)
		}})
	}
	return routines
}
