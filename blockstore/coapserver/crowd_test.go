// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// A client that sends requests some at a time, and reads no answers, is not read from any more when
// many wait.
func TestManyWaiting(t *testing.T) {
	backend := sourcetest.NewBackend()
	block := make([]byte, eris.BlockSize32KiB)
	ref := eris.Sum(block)
	backend.Set(ref, block)
	source := backend.Open(4)
	defer source.Close()
	s := New(Config{Source: source, MaxBytes: 1 << 20})
	server, client := net.Pipe()
	c := newConn(s, server, Access{Get: true}, func(bool) {})
	served := make(chan struct{})
	go func() {
		c.serve()
		close(served)
	}()
	if _, err := client.Write(coaptest.Stream(codes.CSM, coap.Token{}, nil, "")); err != nil {
		t.Fatal(err)
	}
	get := coaptest.Stream(codes.GET, coaptest.Token(1), coaptest.Get(ref, eris.BlockSize32KiB, coap.Block{}), "")
	var some []byte
	for range 200 { // fewer than are handed over at once
		some = append(some, get...)
	}
	// A server that stops reading is what is wanted; a slow one sends the test home as well.
	client.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	const most = 200
	written := 0
	for ; written < most; written++ {
		if _, err := client.Write(some); err != nil {
			break
		}
	}
	c.peer.Lock()
	waiting := len(c.gets) - c.firstGet
	c.peer.Unlock()
	if waiting > 2*maxWaitingGets {
		t.Errorf("%d requests wait", waiting)
	}
	client.Close()
	s.Close()
	<-served
}
