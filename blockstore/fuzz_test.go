// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// FuzzIndex feeds bytes to what reads values of the index. What is taken is written back as it was.
func FuzzIndex(f *testing.F) {
	ref := eris.Sum(nil)
	f.Add(appendLocation(ref[:], &ref, makeLocation(0x12345678, class32KiB, maxSlots-1)))
	f.Add((&state{[classes]int64{3, 4}}).append(nil))
	f.Add((&bitmap{0: 1, 63: 1 << 63}).append(slotKey(1, 2), slotKey(1, 2)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= len(ref) {
			ref := eris.Reference(b[:len(ref)])
			if l, err := parseLocation(ref[:], b[len(ref):]); err == nil {
				if got := appendLocation(ref[:], &ref, l); !bytes.Equal(got, b) {
					t.Errorf("location %x was read as %x and written as %x", b, l, got)
				}
				if l.class() >= classes || l.slot() >= maxSlots || makeLocation(l.sum(), l.class(), l.slot()) != l {
					t.Errorf("location %x", l)
				}
			}
		}
		if s, err := parseState(b); err == nil {
			if got := s.append(nil); !bytes.Equal(got, b) {
				t.Errorf("state %x was read as %+v and written as %x", b, s, got)
			}
			if s.bytes() < 0 {
				t.Errorf("state %+v", s)
			}
		}
		if len(b) >= slotKeySize {
			k, v := b[:slotKeySize], b[slotKeySize:]
			if c, bits, err := parseChunk(k, v); err == nil {
				if c >= classes || !bytes.Equal(bits.append(nil, k), v) {
					t.Errorf("chunk %x", b)
				}
			}
		}
	})
}
