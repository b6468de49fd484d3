// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !linux

package coap

import "errors"

const haveVectors = false

func readVector(uintptr, [][]byte) (int, bool, error) {
	return 0, false, errors.ErrUnsupported
}

// SetSocketBuffers leaves the buffers as they are.
func SetSocketBuffers(uintptr, int) {}
