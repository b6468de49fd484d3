// SPDX-License-Identifier: GPL-3.0-or-later

// Package testhelp has what the tests of many packages need.
package testhelp

import "testing"

// Must ends the test if there is an error.
func Must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
