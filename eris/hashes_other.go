// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !amd64 || purego || !gc

package eris

// sumBlocksVector does nothing where there are no vector routines.
func sumBlocksVector(sums [][32]byte, blocks [][]byte, secret *ConvergenceSecret) int { return 0 }
