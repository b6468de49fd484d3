// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bufio"
	"bytes"
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// peer is the other end of one connection, played by a script.
type peer struct {
	t       *testing.T
	conn    net.Conn
	r       *bufio.Reader
	aborted bool // the client has said Abort
}

// read returns the next message; ok is false when the connection is over.
func (p *peer) read() (m coaptest.Message, ok bool) {
	m, err := coaptest.Read(p.r)
	p.aborted = p.aborted || m.Code == codes.Abort
	return m, err == nil
}

// readUntil passes over messages until one with the code comes.
func (p *peer) readUntil(code codes.Code) (m coaptest.Message, ok bool) {
	for {
		if m, ok = p.read(); !ok || m.Code == code {
			return m, ok
		}
	}
}

// begin says what it can receive, and returns the first message with the code.
func (p *peer) begin(code codes.Code) coaptest.Message {
	p.write(csm)
	m, _ := p.readUntil(code)
	return m
}

// write sends bytes. It reports whether that was possible.
func (p *peer) write(b ...[]byte) bool {
	_, err := p.conn.Write(bytes.Join(b, nil))
	return err == nil
}

// awaitEnd reads until the connection is over, and returns the code of the last message.
func (p *peer) awaitEnd() (last codes.Code) {
	for {
		m, ok := p.read()
		if !ok {
			return last
		}
		last = m.Code
	}
}

// script plays a peer: it is called for each connection with its number, from 0 on. The connection
// is closed when it returns.
type script func(connection int, p *peer)

// listen serves connections, each of which is closed when f returns, and returns the address.
func listen(t *testing.T, network, address string, f func(connection int, conn net.Conn)) string {
	listener, err := net.Listen(network, address)
	must(t, err)
	serveOn(t, listener, f)
	return listener.Addr().String()
}

// serveOn does so where somebody listens.
func serveOn(t *testing.T, listener net.Listener, f func(connection int, conn net.Conn)) {
	var group sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	group.Go(func() {
		for n := 0; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			group.Go(func() {
				defer conn.Close()
				f(n, conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for _, conn := range conns {
			conn.Close()
		}
		mu.Unlock()
		group.Wait()
	})
}

// playPeer starts to play a peer and returns the URL of it.
func playPeer(t *testing.T, play script) (url string) {
	return "coap+unix://" + listen(t, "unix", filepath.Join(t.TempDir(), "s"), play.run(t))
}

func (play script) run(t *testing.T) func(n int, conn net.Conn) {
	return func(n int, conn net.Conn) { play(n, &peer{t: t, conn: conn, r: bufio.NewReaderSize(conn, 1<<16)}) }
}

// openPeer opens a store that is played by a script.
func openPeer(t *testing.T, options coap.Options, play script) *coap.Store {
	store := mustOpen(t, playPeer(t, play), options)
	t.Cleanup(func() { store.Close() })
	return store
}

// openInNetwork does so in a bubble, in which a peer is late only if it waits.
func openInNetwork(t *testing.T, options coap.Options, play script) *coap.Store {
	var network sourcetest.Network
	listener := network.Listen()
	serveOn(t, listener, play.run(t))
	options.Dial = func(ctx context.Context) (net.Conn, error) {
		return network.Dial(ctx, "tcp", listener.Addr().String())
	}
	store := mustOpen(t, "coap+tcp://192.0.2.1", options)
	t.Cleanup(func() { store.Close() })
	return store
}

var csm = coaptest.CSM

// newBlock returns a block that is told from others by a number.
func newBlock(size eris.BlockSize, n int) (eris.Reference, []byte) {
	block := bytes.Repeat([]byte{byte(n), byte(n >> 8), byte(n >> 16), 1}, int(size)/4)
	return eris.Sum(block), block
}

// answer is 2.05 with a payload.
func answer(m coaptest.Message, payload []byte) []byte {
	return coaptest.Stream(codes.Content, m.Token, nil, payload)
}

// serve says what it can receive, and answers each request of a kind by what f returns.
func (p *peer) serve(code codes.Code, f func(m coaptest.Message) []byte) {
	p.write(csm)
	for {
		m, ok := p.readUntil(code)
		if !ok {
			return
		}
		p.write(f(m))
	}
}

// serveBlock answers all requests with one block.
func (p *peer) serveBlock(block []byte) {
	p.serve(codes.GET, func(m coaptest.Message) []byte { return answer(m, block) })
}

// get gets a block and wants the outcome within a time that only a call that hangs exceeds.
func get(t *testing.T, store *coap.Store, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Minute, errHangs)
	defer cancel()
	return fetch.Get(ctx, store, ref, size, make([]byte, 0, size))
}
