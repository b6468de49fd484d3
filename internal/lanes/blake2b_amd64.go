// SPDX-License-Identifier: GPL-3.0-or-later

//go:build amd64 && !purego && gc

package lanes

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// The 512-bit routine is used from the processor generation on that has VBMI2 (Ice Lake, Zen 4).
// Older ones with AVX-512 lower their clock for 512-bit work, and that of whatever else runs on the
// core with it.
var (
	useAVX2   = cpu.X86.HasAVX2
	useAVX512 = cpu.X86.HasAVX512F && cpu.X86.HasAVX512VBMI2
)

// iv are the first eight words of the state of BLAKE2b (RFC 7693, section 2.6).
var iv = [8]uint64{
	0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
	0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
}

// How many hashes each routine makes at a time, and from how many on it is faster than the blake2b
// package: lanes that have no block of their own then repeat the last one. For a single block both
// take the same time.
const (
	lanesAVX2   = 4
	lanesAVX512 = 8
	least       = 2
)

// compressAVX512 takes chunks of 128 bytes, one after another from each of eight blocks, into eight
// states of BLAKE2b. Word i of state j is state[8*i+j]. Before is how many bytes each state has
// taken in; last says that the last of these chunks is the last of the message.
//
//go:noescape
func compressAVX512(state *[64]uint64, blocks *[8]*byte, chunks int, before uint64, last bool)

// compressAVX2 is the same for four blocks and states. Word i of state j is state[4*i+j]. It spoils
// the scratch.
//
//go:noescape
func compressAVX2(state *[64]uint64, blocks *[8]*byte, chunks int, before uint64, last bool, scratch *[64]uint64)

// compressLanes is compressAVX512 for 8 lanes, compressAVX2 for 4.
func compressLanes(lanes int, state *[64]uint64, blocks *[8]*byte, chunks int, before uint64, last bool) {
	if lanes == lanesAVX512 {
		compressAVX512(state, blocks, chunks, before, last)
		return
	}
	var scratch [64]uint64
	compressAVX2(state, blocks, chunks, before, last, &scratch)
}

// sumVector does the work of Sum256 for the first blocks, and returns for how many. The other one
// is hashed as fast by the blake2b package.
func sumVector(sums [][32]byte, blocks [][]byte, key *[32]byte) (done int) {
	if len(blocks) < least || !useAVX2 && !useAVX512 {
		return 0
	}
	lanes := lanesAVX2
	if useAVX512 {
		lanes = lanesAVX512
	}
	// The state before the first byte of a block is the same for all. A key is a chunk of its own
	// in front (RFC 7693, section 2.9), so that one turn for it does for all blocks.
	var state [64]uint64
	var data [8]*byte
	start, before := iv, uint64(0)
	start[0] ^= 0x01010000 ^ 32 // no tree, no key, 32 bytes of hash
	if key != nil {
		start[0] ^= uint64(len(key)) << 8
		var padded [chunk]byte
		copy(padded[:], key[:])
		for lane := range lanes {
			data[lane] = &padded[0]
		}
		setLanes(&state, &start, lanes)
		compressLanes(lanes, &state, &data, 1, 0, false)
		for i := range start {
			start[i] = state[lanes*i]
		}
		before = chunk
	}
	for len(blocks)-done >= least {
		n := min(lanes, len(blocks)-done)
		for lane := range lanes {
			data[lane] = unsafe.SliceData(blocks[done+min(lane, n-1)])
		}
		setLanes(&state, &start, lanes)
		compressLanes(lanes, &state, &data, len(blocks[0])/chunk, before, true)
		for lane := range n {
			sum := &sums[done+lane]
			for i := range len(sum) / 8 {
				binary.LittleEndian.PutUint64(sum[8*i:], state[lanes*i+lane])
			}
		}
		done += n
	}
	return done
}

// setLanes sets the state of every lane to start.
func setLanes(state *[64]uint64, start *[8]uint64, lanes int) {
	for i, word := range start {
		for lane := range lanes {
			state[lanes*i+lane] = word
		}
	}
}
