// SPDX-License-Identifier: GPL-3.0-or-later

package websocket

import (
	"bytes"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// FuzzWebSocket compares the head that a message over WebSockets is given with what is left when it
// is taken off.
func FuzzWebSocket(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 0xe1, 0x23, 1, 0, 0, 0x20})
	f.Add([]byte{8, 0x45, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Add([]byte{9, 0x45, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte{0x10, 0x45})
	for _, n := range []int{12, 13, 268, 269, coap.MessageSize - 2} {
		f.Add(append([]byte{1, 0x45, 7}, make([]byte, n)...))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		if len(message) > coap.MessageSize {
			return
		}
		b := append(make([]byte, headRoom), message...)
		start, err := fromWebSocket(b)
		if err != nil {
			if len(message) >= 2 && message[0] <= coap.MaxTokenSize && len(message) >= 2+int(message[0]) {
				t.Errorf("%x: %v", message, err)
			}
			return
		}
		head, err := coap.ParseHead(b[start:], 2*coap.MessageSize)
		if err != nil {
			t.Fatalf("%x: %v", message, err)
		}
		if head.Size+head.Length != len(b)-start {
			t.Errorf("%x: head says %d bytes of %d", message, head.Size+head.Length, len(b)-start)
		}
		back := bytes.Clone(b[start+head.Size-2-int(head.Token.Size):])
		back[0] = head.Token.Size
		if !bytes.Equal(back, message) {
			t.Errorf("%x has become %x", message, back)
		}
	})
}
