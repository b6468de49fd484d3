// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"testing"
)

// FuzzRecord feeds bytes to what reads values of the index. What is taken is written back as it was.
func FuzzRecord(f *testing.F) {
	f.Add(record{makeLocation(0x12345678, class32KiB, maxSlots-1), 1}.append(nil))
	f.Add((&state{pin: 1, blocks: [classes]int64{3, 4}, pinned: [classes]int64{0, 4}}).append(nil))
	f.Add((&bitmap{0: 1, 63: 1 << 63}).append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecord(b); err == nil {
			if got := r.append(nil); !bytes.Equal(got, b) {
				t.Errorf("record %x was read as %+v and written as %x", b, r, got)
			}
			l := r.location
			if l.class() >= classes || l.slot() >= maxSlots || makeLocation(l.sum(), l.class(), l.slot()) != l {
				t.Errorf("location %x", l)
			}
		}
		if s, err := parseState(b); err == nil {
			if got := s.append(nil); !bytes.Equal(got, b) {
				t.Errorf("state %x was read as %+v and written as %x", b, s, got)
			}
			if s.bytes() < 0 || bytesOf(s.pinned) > s.bytes() {
				t.Errorf("state %+v", s)
			}
		}
		if len(b) >= slotKeySize {
			k, v := b[:slotKeySize], b[slotKeySize:]
			if c, bits, err := parseChunk(k, v); err == nil {
				if c >= classes || !bytes.Equal(bits.append(nil), v) {
					t.Errorf("chunk %x", b)
				}
			}
		}
	})
}
