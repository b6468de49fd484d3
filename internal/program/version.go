// SPDX-License-Identifier: GPL-3.0-or-later

package program

import "runtime/debug"

// release is the version; the Makefile takes it from here.
const release = "0.1.0"

// Version is the version, and the commit that the program was built from, if that is known.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return release
	}
	set := map[string]string{}
	for _, s := range info.Settings {
		set[s.Key] = s.Value
	}
	commit := set["vcs.revision"]
	if commit == "" {
		return release
	}
	if commit = commit[:min(12, len(commit))]; set["vcs.modified"] == "true" {
		commit += ", changed"
	}
	return release + " (" + commit + ")"
}
