// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// lossy is a socket that loses, doubles and delays datagrams, in both directions.
type lossy struct {
	net.PacketConn
	percent int
	group   sync.WaitGroup

	mu     sync.Mutex
	random *rand.Rand
	again  [][]byte // read once more
	from   net.Addr
}

func (l *lossy) roll() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.random.IntN(100)
}

func (l *lossy) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		l.mu.Lock()
		if n := len(l.again); n > 0 {
			copied, from := copy(b, l.again[n-1]), l.from
			l.again = l.again[:n-1]
			l.mu.Unlock()
			return copied, from, nil
		}
		l.mu.Unlock()
		n, from, err := l.PacketConn.ReadFrom(b)
		if err != nil {
			return n, from, err
		}
		switch roll := l.roll(); {
		case roll < l.percent:
			continue
		case roll < 2*l.percent:
			l.mu.Lock()
			l.again, l.from = append(l.again, bytes.Clone(b[:n])), from
			l.mu.Unlock()
		}
		return n, from, nil
	}
}

func (l *lossy) WriteTo(b []byte, to net.Addr) (int, error) {
	switch roll := l.roll(); {
	case roll < l.percent:
	case roll < 2*l.percent:
		l.PacketConn.WriteTo(b, to)
		l.PacketConn.WriteTo(b, to)
	case roll < 3*l.percent:
		late := bytes.Clone(b)
		l.group.Go(func() {
			time.Sleep(time.Millisecond)
			l.PacketConn.WriteTo(late, to)
		})
	default:
		return l.PacketConn.WriteTo(b, to)
	}
	return len(b), nil
}

// fast are options for a peer that is near and loses datagrams.
var fast = coap.Options{RequestTimeout: 3 * time.Minute, Datagram: wire.EndpointConfig{AckTimeout: 20 * time.Millisecond, MaxRetransmit: 100}}

// TestLoss puts and gets blocks by UDP over a line that loses, doubles and delays one datagram in
// ten each, with a server that answers at once, and one that takes so long that answers come apart.
func TestLoss(t *testing.T) {
	for _, v := range []struct {
		name     string
		ackDelay time.Duration
		latency  time.Duration
	}{{"at once", 0, 0}, {"apart", time.Millisecond, 4 * time.Millisecond}} {
		t.Run(v.name, func(t *testing.T) {
			store := newSlowStore(v.latency)
			defer store.Close()
			config := coapserver.Config{Source: store, Sink: store}
			config.Datagram.AckDelay, config.Datagram.AckTimeout = v.ackDelay, 20*time.Millisecond
			server := coapserver.New(config)
			socket, err := net.ListenPacket("udp", "127.0.0.1:0")
			must(t, err)
			line := &lossy{PacketConn: socket, percent: 10, random: rand.New(rand.NewPCG(1, 2))}
			var group sync.WaitGroup
			group.Go(func() { server.ServePacket(line, readWrite) })
			client := mustOpen(t, "coap://"+socket.LocalAddr().String(), fast)
			var calls sync.WaitGroup
			for i := range 12 {
				size := eris.BlockSize1KiB
				if i%3 == 0 {
					size = eris.BlockSize32KiB
				}
				ref, block := newBlock(size, i)
				for i := range block {
					block[i] ^= byte(i >> 10 * 7)
				}
				ref = eris.Sum(block)
				calls.Go(func() {
					if err := client.Put(t.Context(), ref, block); err != nil {
						t.Errorf("Put: %v", err)
						return
					}
					if !store.Has(ref) {
						t.Error("the block that was put is not there")
					}
					if got, err := get(t, client, ref, size); err != nil || !bytes.Equal(got, block) {
						t.Errorf("Get: %v", err)
					}
				})
			}
			calls.Wait()
			client.Close()
			server.Close()
			group.Wait()
			line.group.Wait()
		})
	}
}

// slowStore is a store in memory that takes its time.
type slowStore struct {
	*fetch.Workers
	*sourcetest.Backend
	latency time.Duration
}

func newSlowStore(latency time.Duration) *slowStore {
	s := &slowStore{Backend: sourcetest.NewBackend(), latency: latency}
	s.Workers = fetch.NewWorkers("slow:", 100, func(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
		time.Sleep(s.latency)
		return s.Get(ctx, ref, size, dst)
	})
	return s
}

func (s *slowStore) PutBatch(ctx context.Context, refs []eris.Reference, blocks [][]byte) error {
	time.Sleep(s.latency)
	return s.Backend.PutBatch(ctx, refs, blocks)
}

// datagramPeer plays the other end of UDP: f returns what is sent in answer to a datagram.
func datagramPeer(t *testing.T, f func(m coaptest.Message) [][]byte) (url string) {
	return datagramPeerFor(t, func(_ net.Addr, m coaptest.Message) [][]byte { return f(m) })
}

// datagramPeerFor does so where it matters from where a datagram comes.
func datagramPeerFor(t *testing.T, f func(from net.Addr, m coaptest.Message) [][]byte) (url string) {
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	var group sync.WaitGroup
	group.Go(func() {
		b := make([]byte, 2000)
		for {
			n, from, err := socket.ReadFrom(b)
			if err != nil {
				return
			}
			m, err := coaptest.ParseDatagram(b[:n])
			if err != nil {
				t.Errorf("client sends nonsense: %v", err)
				continue
			}
			for _, reply := range f(from, m) {
				socket.WriteTo(reply, from)
			}
		}
	})
	t.Cleanup(func() {
		socket.Close()
		group.Wait()
	})
	return "coap://" + socket.LocalAddr().String()
}

// TestDatagramHostile has peers that do not keep to the protocol.
func TestDatagramHostile(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	largeRef, _ := newBlock(eris.BlockSize32KiB, 2)
	refs := map[eris.BlockSize]eris.Reference{1024: ref, 32768: largeRef}
	type script = func(m coaptest.Message) [][]byte
	// reply answers each request by a message.
	reply := func(kind message.Type, code codes.Code, options, payload []byte) script {
		return func(m coaptest.Message) [][]byte {
			if code == codes.Empty {
				m.Token = wire.Token{}
			}
			return [][]byte{coaptest.Datagram(kind, code, m.ID, m.Token, options, payload)}
		}
	}
	content := func(payload []byte) script { return reply(message.Acknowledgement, codes.Content, nil, payload) }
	acknowledge := reply(message.Acknowledgement, codes.Empty, nil, nil)
	after := func(first, second script) script {
		return func(m coaptest.Message) [][]byte { return append(first(m), second(m)...) }
	}
	// parts answers by the part that f returns, with so many bytes.
	parts := func(size int, f func(asked wire.Block) wire.Block) script {
		return func(m coaptest.Message) [][]byte {
			part := f(m.Block(message.Block2))
			part.Present = true
			return reply(message.Acknowledgement, codes.Content, part.AppendOption(nil, 0, message.Block2), make([]byte, size))(m)
		}
	}
	always := func(part wire.Block) func(wire.Block) wire.Block { return func(wire.Block) wire.Block { return part } }
	for _, v := range []struct {
		name  string
		reply script
		size  eris.BlockSize
		want  outcome
	}{
		{"never answers", func(coaptest.Message) [][]byte { return nil }, 1024, fails},
		{"rejects", reply(message.Reset, codes.Empty, nil, nil), 1024, fails},
		{"acknowledges only", acknowledge, 1024, fails},
		{"wrong bytes", content(make([]byte, 1024)), 1024, wrong},
		{"one byte less", content(block[1:]), 1024, wrong},
		{"no payload", content(nil), 1024, wrong},
		{"other token", func(m coaptest.Message) [][]byte { m.Token.Value++; return content(block)(m) }, 1024, fails},
		{"other ID", func(m coaptest.Message) [][]byte { m.ID++; return content(block)(m) }, 1024, fails},
		{"malformed options", reply(message.Acknowledgement, codes.Content, []byte{0xf0}, block), 1024, fails},
		{"too long", content(make([]byte, 1900)), 1024, fails},
		{"noise", func(coaptest.Message) [][]byte {
			return [][]byte{block, {}, {0x40}, {0x4f, 0x45, 0, 0}, {0x40, 0, 0, 0, 0}}
		}, 1024, fails},
		{"missing", reply(message.Acknowledgement, codes.NotFound, nil, nil), 1024, missing},
		{"answers twice", after(content(block), content(make([]byte, 1024))), 1024, works},
		{"answers apart", after(acknowledge, reply(message.Confirmable, codes.Content, nil, block)), 1024, works},
		{"answers apart, without ado", reply(message.NonConfirmable, codes.Content, nil, block), 1024, works},
		{"endless parts", parts(16, always(wire.Block{More: true})), 32768, fails},
		{"endless parts that go on", parts(1024, func(asked wire.Block) wire.Block {
			return wire.Block{Number: asked.Number, More: true, Exponent: 6}
		}), 32768, wrong},
		{"parts as there are on streams only", parts(1024, always(wire.Block{More: true, Exponent: wire.BERT})), 32768, fails},
		{"last part as there are on streams only", parts(1024, always(wire.Block{Exponent: wire.BERT})), 1024, fails},
		{"parts that get smaller", func(m coaptest.Message) [][]byte {
			asked := m.Block(message.Block2)
			if asked.Number == 0 {
				asked.Exponent = 6
			} else if asked.Exponent == 6 {
				asked.Number, asked.Exponent = asked.Number*2, 5
			}
			asked.More = true
			return parts(asked.Unit(), always(asked))(m)
		}, 32768, wrong},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			url := datagramPeer(t, func(m coaptest.Message) [][]byte {
				if m.Code != codes.GET {
					return nil
				}
				return v.reply(m)
			})
			options := coap.Options{}
			if v.want == fails {
				options.RequestTimeout = 300 * time.Millisecond
				options.Datagram = wire.EndpointConfig{AckTimeout: 20 * time.Millisecond, MaxRetransmit: 2}
			}
			store := mustOpen(t, url, options)
			defer store.Close()
			_, err := get(t, store, refs[v.size], v.size)
			v.want.check(t, err)
		})
	}
}

// TestDatagramPeer checks what the client sends: copies of a message that is lost, acknowledgements
// for answers that come apart, also when these come again, and answers to requests and pings of the
// peer, and to what is malformed.
func TestDatagramPeer(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	var copies, acks, resets, notFound atomic.Int32
	var first []byte
	done := make(chan struct{})
	answer := func(m coaptest.Message) []byte {
		return coaptest.Datagram(message.Confirmable, codes.Content, 99, m.Token, nil, block)
	}
	token := wire.Token{Value: 0xabcd, Size: 2}
	url := datagramPeer(t, func(m coaptest.Message) [][]byte {
		switch {
		case m.Type == message.Acknowledgement && m.Code == codes.Empty && m.ID == 99:
			if acks.Add(1) == 2 {
				return [][]byte{
					coaptest.Datagram(message.Confirmable, codes.Content, 100, wire.Token{Value: 7, Size: 1}, nil, block),
					coaptest.Datagram(message.Confirmable, codes.Empty, 101, wire.Token{}, nil, ""),
					[]byte("\x49\x01\x00\x67123456789"), // a token that is too long
					[]byte("\x40\x00\x00\x68\xff"),      // an empty message that is not
					coaptest.Datagram(message.Confirmable, codes.GET, 102, token, nil, ""),
				}
			}
		case m.Type == message.Reset:
			resets.Add(1)
		case m.Type == message.Acknowledgement && m.Code == codes.NotFound && m.Token == token:
			notFound.Add(1)
			close(done)
		case m.Code == codes.GET:
			again := coaptest.Datagram(m.Type, m.Code, m.ID, m.Token, m.Body, "")
			n := copies.Add(1)
			if n == 1 {
				first = bytes.Clone(again)
			} else if !bytes.Equal(first, again) {
				t.Error("the copy is another message")
			}
			if n == 2 { // on a busy machine there are more
				return [][]byte{answer(m), answer(m)}
			}
		default:
			t.Errorf("message %+v", m)
		}
		return nil
	})
	store := mustOpen(t, url, coap.Options{Datagram: wire.EndpointConfig{AckTimeout: 50 * time.Millisecond}})
	defer store.Close()
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
		t.Fatal(err)
	}
	<-done
	if copies.Load() < 2 || acks.Load() != 2 || resets.Load() != 4 || notFound.Load() != 1 {
		t.Errorf("%d copies, %d acknowledgements, %d resets, %d times 4.04", copies.Load(), acks.Load(), resets.Load(), notFound.Load())
	}
}

// TestDatagramSameID has a peer whose answers, which come apart, all have the same message ID.
func TestDatagramSameID(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	url := datagramPeer(t, func(m coaptest.Message) [][]byte {
		if m.Code != codes.GET {
			return nil
		}
		return [][]byte{
			coaptest.Datagram(message.Acknowledgement, codes.Empty, m.ID, wire.Token{}, nil, ""),
			coaptest.Datagram(message.Confirmable, codes.Content, 99, m.Token, nil, block),
		}
	})
	store := mustOpen(t, url, coap.Options{RequestTimeout: time.Minute})
	defer store.Close()
	for range 3 {
		if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDatagramIDs gets so many blocks by UDP from a peer that it would take a message for a copy of
// one before, if all came from one address.
func TestDatagramIDs(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	type messageKey struct {
		from string
		id   uint16
	}
	tokens := make(map[messageKey]wire.Token)
	url := datagramPeerFor(t, func(from net.Addr, m coaptest.Message) [][]byte {
		key := messageKey{from.String(), m.ID}
		if before, ok := tokens[key]; ok && before != m.Token {
			t.Errorf("the message ID %d comes a second time from %s", m.ID, from)
		}
		tokens[key] = m.Token
		return [][]byte{coaptest.Datagram(message.Acknowledgement, codes.Content, m.ID, m.Token, nil, block)}
	})
	store := mustOpen(t, url, coap.Options{})
	defer store.Close()
	const blocks = 1<<16 + 100
	var calls sync.WaitGroup
	var next atomic.Int32
	for range 16 {
		calls.Go(func() {
			for next.Add(1) <= blocks && !t.Failed() {
				if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
					t.Error(err)
				}
			}
		})
	}
	calls.Wait()
}

// TestDatagramRefused checks that a port where nobody listens is noticed at once, if the system
// tells.
func TestDatagramRefused(t *testing.T) {
	// One that listens to another port only keeps its own from others.
	socket, err := net.Dial("udp", "127.0.0.1:1")
	must(t, err)
	defer socket.Close()
	store := mustOpen(t, "coap://"+socket.LocalAddr().String(), coap.Options{RequestTimeout: 5 * time.Second})
	defer store.Close()
	ref, block := newBlock(eris.BlockSize32KiB, 1)
	_, err = get(t, store, ref, eris.BlockSize32KiB)
	fails.check(t, err)
	if err := store.Put(t.Context(), ref, block); err == nil {
		t.Error("Put did not fail")
	}
}

// TestDatagramWindow checks that no more exchanges are in flight than the window allows, and that
// it starts small.
func TestDatagramWindow(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	var mu sync.Mutex
	var held [][]byte
	most := 0
	url := datagramPeer(t, func(m coaptest.Message) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		held = append(held, coaptest.Datagram(message.Acknowledgement, codes.Content, m.ID, m.Token, nil, block))
		most = max(most, len(held))
		if len(held) < 4 {
			return nil
		}
		all := held
		held = nil
		return all
	})
	store := mustOpen(t, url, coap.Options{Datagram: wire.EndpointConfig{Window: 4, AckTimeout: 10 * time.Second}})
	defer store.Close()
	var group sync.WaitGroup
	for range 40 {
		group.Go(func() {
			if _, err := get(t, store, ref, eris.BlockSize1KiB); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	mu.Lock()
	defer mu.Unlock()
	if most != 4 {
		t.Errorf("%d exchanges in flight", most)
	}
}

// TestDatagramPutToken checks that all parts of a block have one token, and those of another block
// another; and that a late copy of the answer to a part is not taken for that to the next.
func TestDatagramPutToken(t *testing.T) {
	var mu sync.Mutex
	tokens := make(map[wire.Token]map[uint32]bool)
	url := datagramPeer(t, func(m coaptest.Message) [][]byte {
		part := m.Block(message.Block1)
		mu.Lock()
		if tokens[m.Token] == nil {
			tokens[m.Token] = make(map[uint32]bool)
		}
		tokens[m.Token][part.Number] = true // one that is late comes again
		mu.Unlock()
		code := codes.Continue
		if !part.More {
			code = codes.Created
		}
		reply := coaptest.Datagram(message.Acknowledgement, code, m.ID, m.Token, part.AppendOption(nil, 0, message.Block1), "")
		if part.Number == 0 {
			return [][]byte{reply}
		}
		before := wire.Block{Number: part.Number - 1, More: true, Exponent: part.Exponent}
		late := coaptest.Datagram(message.NonConfirmable, codes.Continue, m.ID, m.Token, before.AppendOption(nil, 0, message.Block1), "")
		return [][]byte{late, reply}
	})
	store := mustOpen(t, url, coap.Options{Datagram: wire.EndpointConfig{AckTimeout: 10 * time.Second}})
	defer store.Close()
	putMany(t, store, 8)
	mu.Lock()
	defer mu.Unlock()
	for token, parts := range tokens {
		if len(parts) != 32 {
			t.Errorf("%d parts have the token %x", len(parts), token.Value)
		}
	}
}

// putMany puts so many blocks of 32 KiB at the same time.
func putMany(t *testing.T, store *coap.Store, blocks int) {
	var group sync.WaitGroup
	for i := range blocks {
		ref, block := newBlock(eris.BlockSize32KiB, i)
		group.Go(func() {
			if err := store.Put(t.Context(), ref, block); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

// TestDatagramPutMany puts blocks by UDP, each part of which is answered before the next is sent:
// as many at a time as get through, from as many addresses. These are sixteen in the end, and four,
// as at first, again when the first copy of each fourth part is lost.
func TestDatagramPutMany(t *testing.T) {
	var mu sync.Mutex
	var loses bool
	last := make(map[string]uint16) // message ID at an address
	url := datagramPeerFor(t, func(from net.Addr, m coaptest.Message) [][]byte {
		part := m.Block(message.Block1)
		mu.Lock()
		again := last[from.String()] == m.ID
		last[from.String()] = m.ID
		lost := loses && !again && part.Number%4 == 3
		mu.Unlock()
		if lost {
			return nil
		}
		code := codes.Continue
		if !part.More {
			code = codes.Created
		}
		return [][]byte{coaptest.Datagram(message.Acknowledgement, code, m.ID, m.Token, part.AppendOption(nil, 0, message.Block1), "")}
	})
	store := mustOpen(t, url, fast)
	defer store.Close()
	put := func(blocks int) (addresses int) {
		mu.Lock()
		clear(last)
		mu.Unlock()
		putMany(t, store, blocks)
		mu.Lock()
		defer mu.Unlock()
		return len(last)
	}
	for _, want := range []int{16, 4} {
		tries := 0
		for put(2*want) != want {
			if tries++; tries > 100 { // on a busy machine it may take some time
				t.Fatalf("parts are lost: %t; blocks do not come from %d addresses", loses, want)
			}
		}
		mu.Lock()
		loses = true
		mu.Unlock()
	}
}

// TestDatagramPutCrowded puts blocks by UDP to a server that has room for the parts of eight at a
// time, and drops the one of which no part has come for the longest: fewer are put at a time then.
func TestDatagramPutCrowded(t *testing.T) {
	const room = 8
	var mu sync.Mutex
	var coming []string // from which addresses, the one that has been silent for the longest first
	url := datagramPeerFor(t, func(from net.Addr, m coaptest.Message) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		part, code := m.Block(message.Block1), codes.Continue
		i := slices.Index(coming, from.String())
		if i >= 0 {
			coming = slices.Delete(coming, i, i+1)
		}
		switch {
		case i < 0 && part.Number > 0:
			code = codes.RequestEntityIncomplete
		case !part.More:
			code = codes.Created
		default:
			coming = append(coming, from.String())
			coming = coming[max(0, len(coming)-room):]
		}
		return [][]byte{coaptest.Datagram(message.Acknowledgement, code, m.ID, m.Token, part.AppendOption(nil, 0, message.Block1), "")}
	})
	store := mustOpen(t, url, fast)
	defer store.Close()
	putMany(t, store, 128)
}

// TestDatagramOrder gets two blocks by UDP from a peer that answers the first request for the
// second one when it has been asked for a part of the first: one comes after the other. All that
// comes is progress, the first parts as well.
func TestDatagramOrder(t *testing.T) {
	const parts = int(eris.BlockSize32KiB) / 1024
	refs, blocks := make([]eris.Reference, 2), make([][]byte, 2)
	for i := range refs {
		refs[i], blocks[i] = newBlock(eris.BlockSize32KiB, i)
	}
	asked := [2]map[uint32]bool{{}, {}} // for which parts; on a busy machine some are asked for again
	begun := make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	var held []byte
	var behind atomic.Int32 // how many parts of the second one had been requested at the end of the first
	behind.Store(-1)
	url := datagramPeer(t, func(m coaptest.Message) (replies [][]byte) {
		time.Sleep(time.Millisecond)
		part, i := m.Block(message.Block2), 0
		if bytes.Contains(m.Body, []byte(refs[1].String())) {
			i = 1
		}
		asked[i][part.Number] = true
		begin()
		if i == 0 && len(asked[0]) == parts {
			behind.CompareAndSwap(-1, int32(len(asked[1])))
		}
		part.Present, part.Exponent, part.More = true, wire.MaxExponent, int(part.Number) < parts-1
		payload := blocks[i][part.Offset():][:1024]
		reply := coaptest.Datagram(message.Acknowledgement, codes.Content, m.ID, m.Token, part.AppendOption(nil, 0, message.Block2), payload)
		if i == 1 && part.Number == 0 && len(asked[0]) < 4 {
			held = reply
			return nil
		}
		if held != nil && len(asked[0]) >= 4 {
			replies, held = [][]byte{held}, nil
		}
		return append(replies, reply)
	})
	store := mustOpen(t, url, coap.Options{})
	var calls sync.WaitGroup
	for i, ref := range refs {
		calls.Go(func() {
			if got, err := get(t, store, ref, eris.BlockSize32KiB); err != nil || !bytes.Equal(got, blocks[i]) {
				t.Errorf("block %d: %v", i, err)
			}
		})
		<-begun
	}
	calls.Wait()
	store.Close()
	if behind := int(behind.Load()); behind > parts/4 {
		t.Errorf("%d parts of the second block are requested before the last one of the first", behind)
	}
	if n := store.Progress(); n != 2*int64(eris.BlockSize32KiB) {
		t.Errorf("the progress is %d bytes", n)
	}
}
