// SPDX-License-Identifier: GPL-3.0-or-later

// Package interop has the sources of IPFS talk to the gateway of boxo, which is that of Kubo. It is a module of its own, because
// boxo would add a hundred modules to ours; run its tests from this directory.
package interop
