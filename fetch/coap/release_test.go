// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// Closing a store ends connections, too, that the peer has released and that still owe an answer,
// which would come in an hour.
func TestCloseWhileReleased(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	released := make(chan struct{})
	store := openPeer(t, coap.Options{RequestTimeout: time.Hour}, func(connection int, p *peer) {
		p.write(csm)
		m, _ := p.readUntil(codes.GET)
		if connection == 0 {
			p.write(coaptest.Stream(codes.Release, wire.Token{}, nil, ""), coaptest.Stream(codes.Ping, wire.Token{}, nil, ""))
			p.readUntil(codes.Pong)
			close(released)
		} else {
			p.write(answer(m, block))
		}
		p.awaitEnd()
	})
	first := make(chan error, 1)
	go func() {
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		first <- err
	}()
	<-released
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	if err := store.Close(); err != nil {
		t.Error(err)
	}
	if err := <-first; err == nil {
		t.Error("a request without an answer has succeeded")
	}
}
