// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"bytes"
	"io"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// TestReaderMemory checks that who gets short messages, one after the other, keeps little memory
// for them, and that long ones come whole.
func TestReaderMemory(t *testing.T) {
	short := encode(codes.GET, makeToken(1), nil, make([]byte, 100))
	long := encode(codes.Content, makeToken(1), nil, bytes.Repeat([]byte("long"), 10000))
	sent := slices.Concat(bytes.Repeat(short, 1000), long, short, long)
	r := newReader(iotest.OneByteReader(bytes.NewReader(sent)))
	var got []int
	for {
		head, body, ok, err := r.next()
		must(t, err)
		if ok {
			if got = append(got, len(body)); len(got) == 1000 && len(r.buffer) != firstBuffer {
				t.Errorf("short messages take %d bytes", len(r.buffer))
			}
			if head.Code == codes.Content && !bytes.HasSuffix(long, body) {
				t.Error("another message")
			}
		} else if err := r.fill(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if len(got) != 1003 || len(r.buffer) > readBuffer {
		t.Errorf("%d messages, in %d bytes", len(got), len(r.buffer))
	}
}
