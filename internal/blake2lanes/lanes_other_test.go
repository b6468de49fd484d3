// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !amd64 || purego || !gc

package blake2lanes

func sumRoutines() []sumRoutine {
	return []sumRoutine{{"chosen", Sum256}, {"plain", sumPlain}}
}
