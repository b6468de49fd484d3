// SPDX-License-Identifier: GPL-3.0-or-later

// Package interop has the sources of IPFS talk to the gateway of boxo, which is that of Kubo, and
// to the daemon of Kubo itself where the program ipfs is there (.ci/interop-kubo builds it).
package interop
