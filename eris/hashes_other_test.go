// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !amd64 || purego || !gc

package eris

func sumRoutines() []sumRoutine {
	return []sumRoutine{{"chosen", sumBlocks}, {"plain", sumBlocksPlain}}
}
