// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !amd64 || purego || !gc

package chacha20

func xorRoutines() []xorRoutine {
	return []xorRoutine{{"chosen", XORKeyStream}}
}
