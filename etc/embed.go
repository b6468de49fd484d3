// SPDX-License-Identifier: GPL-3.0-or-later

// Package etc has the files that connect the program with the rest of a system, for the command
// "setup". They are also installed by "make install".
package etc

import "embed"

//go:embed daemon/guix/extensions/substitute.scm systemd sysusers.d apparmor.d
var files embed.FS

// File returns a file, by its path below the directory of this package.
func File(name string) ([]byte, error) { return files.ReadFile(name) }
