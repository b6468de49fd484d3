// SPDX-License-Identifier: GPL-3.0-or-later

package program

import (
	"runtime/debug"
	"strings"
)

// release is the version; the Makefile takes it from here.
const release = "0.1.0"

// Version is the version, and the commit that the program was built from, if that is known.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || !strings.HasPrefix(info.Main.Version, "v") {
		return release
	}
	return release + " (" + info.Main.Version + ")"
}
