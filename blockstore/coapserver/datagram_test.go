// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bytes"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// socket is a client of UDP that does as it is told, and no more.
type socket struct {
	tb   testing.TB
	conn net.Conn
	id   uint16
}

func dialDatagram(tb testing.TB, address string) *socket {
	conn, err := net.Dial("udp", address)
	must(tb, err)
	tb.Cleanup(func() { conn.Close() })
	return &socket{tb: tb, conn: conn}
}

// send sends a confirmable request.
func (s *socket) send(code codes.Code, token uint32, options, payload []byte) {
	s.id++
	s.conn.Write(coaptest.Datagram(message.Confirmable, code, s.id, coaptest.Token(token), options, payload))
}

func (s *socket) read() coaptest.Message {
	s.conn.SetReadDeadline(time.Now().Add(3 * time.Minute))
	b := make([]byte, 2000)
	n, err := s.conn.Read(b)
	if err != nil {
		s.tb.Fatalf("no answer: %v", err)
	}
	m, err := coaptest.ParseDatagram(b[:n])
	must(s.tb, err)
	return m
}

// TestNeverAcknowledged has as many answers that nobody acknowledges as there are workers: others
// are served all the same.
func TestNeverAcknowledged(t *testing.T) {
	store := &held{release: make(chan struct{})}
	good := newMemory()
	ref, block := good.Add(eris.BlockSize1KiB)
	config := coapserver.Config{Source: good, Sink: store}
	const workers = 4
	config.Datagram = coap.EndpointConfig{Workers: workers, AckDelay: time.Millisecond, AckTimeout: time.Hour}
	_, address := serveConfig(t, "udp", readWrite, config)
	silent := dialDatagram(t, address)
	for i := range workers {
		silent.send(codes.PUT, uint32(i), coaptest.Put(coap.Block{}), block)
	}
	for range workers {
		if m := silent.read(); m.Type != message.Acknowledgement || m.Code != codes.Empty {
			t.Fatalf("%v %v, want an acknowledgement", m.Type, m.Code)
		}
	}
	close(store.release)
	for range workers {
		if m := silent.read(); m.Type != message.Confirmable || m.Code != codes.Created {
			t.Fatalf("%v %v, want an answer that is to be acknowledged", m.Type, m.Code)
		}
	}
	other := dialDatagram(t, address)
	other.send(codes.GET, 1, coaptest.Get(ref, eris.BlockSize1KiB, coap.Block{}), nil)
	if m := other.read(); m.Code != codes.Content && m.Code != codes.Empty {
		t.Errorf("answer %v", m.Code)
	}
}

// exchanger makes an exchange with a server.
type exchanger func(token uint32, options, payload []byte) coaptest.Message

// TestTransfers has clients with several blocks under way part by part: with a token for each, with
// a Request-Tag for each, and with a token for each part.
func TestTransfers(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		store := newMemory()
		config := coapserver.Config{Source: store, Sink: store}
		config.Datagram.AckDelay = time.Hour // no answer comes apart, however busy the machine is
		_, address := serveConfig(t, network, readWrite, config)
		dial := func() exchanger {
			if network == "udp" {
				s := dialDatagram(t, address)
				return func(token uint32, options, payload []byte) coaptest.Message {
					s.send(codes.PUT, token, options, payload)
					return s.read()
				}
			}
			c := dial(t, "tcp", address, csm...)
			return func(token uint32, options, payload []byte) coaptest.Message {
				c.write(coaptest.Stream(codes.PUT, coaptest.Token(token), options, payload))
				return c.readAnswer()
			}
		}
		t.Run(network+"/tokens", func(t *testing.T) {
			putInterleaved(t, dial(), store, 16, func(transfer, _ int) (token uint32, tag string) { return uint32(transfer), "" })
		})
		t.Run(network+"/tags", func(t *testing.T) {
			putInterleaved(t, dial(), store, 16, func(transfer, part int) (token uint32, tag string) {
				return uint32(transfer<<8 + part), string(rune('a' + transfer))
			})
		})
		t.Run(network+"/a token for each part", func(t *testing.T) {
			putInterleaved(t, dial(), store, 1, func(_, part int) (token uint32, tag string) { return uint32(part), "" })
		})
		t.Run(network+"/not told apart", func(t *testing.T) {
			exchange := dial()
			part := func(token, number uint32) codes.Code {
				b := coap.Block{Number: number, More: true, Exponent: 6, Present: true}
				return exchange(token, coaptest.Put(b), make([]byte, 1024)).Code
			}
			for _, v := range []struct {
				token, number uint32
				want          codes.Code
			}{
				{1, 0, codes.Continue}, {2, 0, codes.Continue},
				{3, 1, codes.RequestEntityIncomplete}, // of which?
				{1, 1, codes.RequestEntityIncomplete}, // and so both begin again
				{4, 0, codes.Continue}, {5, 1, codes.Continue}, {5, 1, codes.Continue}, {6, 2, codes.Continue},
				{4, 3, codes.Continue}, {7, 3, codes.RequestEntityIncomplete},
			} {
				if code := part(v.token, v.number); code != v.want {
					t.Errorf("part %d with token %d: %v, want %v", v.number, v.token, code, v.want)
				}
			}
		})
	}
}

// putInterleaved puts n blocks, one part of each after the other.
func putInterleaved(t *testing.T, exchange exchanger, store *sourcetest.Store, n int, name func(transfer, part int) (token uint32, tag string)) {
	t.Helper()
	refs, blocks := make([]eris.Reference, n), make([][]byte, n)
	for i := range n {
		refs[i], blocks[i] = sourcetest.NewBlock(eris.BlockSize32KiB)
	}
	for part := range 32 {
		for i, block := range blocks {
			token, tag := name(i, part)
			b := coap.Block{Number: uint32(part), More: part < 31, Exponent: 6, Present: true}
			options := coaptest.Put(b)
			if tag != "" {
				options = coaptest.Option(options, message.Block1, 292, tag)
			}
			want := codes.Continue
			if part == 31 {
				want = codes.Created
			}
			m := exchange(token, options, bytes.Clone(block[part<<10:(part+1)<<10]))
			if m.Code != want || m.Block(message.Block1) != b {
				t.Fatalf("part %d of block %d: answer %v", part, i, m.Code)
			}
		}
	}
	for i, ref := range refs {
		if !store.Has(ref) {
			t.Errorf("block %d is not there", i)
		}
	}
}
