// SPDX-License-Identifier: GPL-3.0-or-later

package lanes

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// checkXor runs a routine out of place and in place, with the block at an odd address and guarded
// on both sides.
func checkXor(t *testing.T, name string, src []byte, key *[32]byte, nonce byte, shift int) {
	t.Helper()
	want := make([]byte, len(src))
	xorPlain(want, src, key, nonce)

	const guard = 192
	arena := bytes.Repeat([]byte{0xA5}, guard+shift+len(src)+guard)
	dst := arena[guard+shift : guard+shift+len(src) : guard+shift+len(src)]
	kept := bytes.Clone(src)
	for _, place := range []string{"out of place", "in place"} {
		from := src
		if place == "in place" {
			copy(dst, src)
			from = dst
		}
		XORKeyStream(dst, from, key, nonce)
		if !bytes.Equal(dst, want) {
			t.Fatalf("%s, %s, %d bytes, nonce %d, shift %d: differs from the chacha20 package", name, place, len(src), nonce, shift)
		}
		before, after := arena[:guard+shift], arena[guard+shift+len(src):]
		if len(bytes.Trim(before, "\xA5"))+len(bytes.Trim(after, "\xA5")) != 0 {
			t.Fatalf("%s, %s: wrote outside of the block", name, place)
		}
	}
	if !bytes.Equal(src, kept) {
		t.Fatalf("%s: changed its source", name)
	}
}

func TestKeyStreamRoutines(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	withRoutines(func(name string) {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1 << 10, 32 << 10} {
				src := make([]byte, size)
				for nonce := range 256 {
					if size == 32<<10 && nonce > 20 && nonce < 250 {
						continue
					}
					var key [32]byte
					random.Read(key[:])
					random.Read(src)
					checkXor(t, name, src, &key, byte(nonce), nonce%67)
				}
			}
		})
	})
}

// The first block of the key stream of RFC 8439, appendix A.1, test vector 1: key, nonce and
// counter zero.
func TestKeyStreamKnownAnswer(t *testing.T) {
	want := []byte{
		0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90, 0x40, 0x5d, 0x6a, 0xe5, 0x53, 0x86, 0xbd, 0x28,
		0xbd, 0xd2, 0x19, 0xb8, 0xa0, 0x8d, 0xed, 0x1a, 0xa8, 0x36, 0xef, 0xcc, 0x8b, 0x77, 0x0d, 0xc7,
	}
	withRoutines(func(name string) {
		block := make([]byte, 1024)
		XORKeyStream(block, block, &[32]byte{}, 0)
		if !bytes.Equal(block[:len(want)], want) {
			t.Errorf("%s: key stream starts with %x", name, block[:len(want)])
		}
	})
}

func TestKeyStreamRefusesOverlapAndLength(t *testing.T) {
	b := make([]byte, 2*1024)
	for name, f := range map[string]func(){
		"overlap by 1":    func() { XORKeyStream(b[1:1025], b[:1024], &[32]byte{}, 0) },
		"overlap by 1023": func() { XORKeyStream(b[:1024], b[1023:2047], &[32]byte{}, 0) },
		"512 bytes":       func() { XORKeyStream(b[:512], b[:512], &[32]byte{}, 0) },
		"unequal, longer": func() { XORKeyStream(b, b[:1024], &[32]byte{}, 0) },
		"empty":           func() { XORKeyStream(nil, nil, &[32]byte{}, 0) },
		"unequal":         func() { XORKeyStream(b[:1023], b[1024:], &[32]byte{}, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("did not panic")
				}
			}()
			f()
		})
	}
	XORKeyStream(b[:1024], b[1024:], &[32]byte{}, 0) // side by side is no overlap
	XORKeyStream(b[1024:], b[:1024], &[32]byte{}, 255)
}
