// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !amd64 || purego || !gc

package eris

// xorKeyStreamVector does nothing where there are no vector routines.
func xorKeyStreamVector(dst, src []byte, key *Key, level byte) bool { return false }
