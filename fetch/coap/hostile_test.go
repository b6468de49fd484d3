// SPDX-License-Identifier: GPL-3.0-or-later

package coap_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// errHangs is the cause of contexts that only calls that hang see the end of.
var errHangs = errors.New("the call hangs")

// short are options under which what would take a minute takes a fraction of a second. With them
// even a good peer may seem to be silent where the machine is busy.
var short = coap.Options{RequestTimeout: 100 * time.Millisecond}

// outcome is what a test wants of a call.
type outcome int

const (
	fails    outcome = iota // of the connection: the block may be there
	wrong                   // *eris.BlockError
	missing                 // eris.ErrNotFound
	response                // another answer
	works
)

func (want outcome) check(t *testing.T, err error) {
	t.Helper()
	got := fails
	switch {
	case err == nil:
		got = works
	case errors.As(err, new(*eris.BlockError)):
		got = wrong
	case errors.Is(err, eris.ErrNotFound):
		got = missing
	case strings.Contains(err.Error(), "peer answers"):
		got = response
	case errors.Is(err, errHangs):
		t.Error("the call hangs")
		return
	}
	if got != want {
		t.Errorf("outcome is %d (%v), want %d", got, err, want)
	}
	if err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
		t.Errorf("error has control characters: %q", err)
	}
}

// TestBusy has peers that are busy: those that say for how long are left alone for so long.
func TestBusy(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	for _, v := range []struct {
		code codes.Code
		age  string
		want time.Duration
	}{
		{codes.ServiceUnavailable, "\x05", 5 * time.Second},
		{codes.TooManyRequests, "\x05", 5 * time.Second},
		{codes.ServiceUnavailable, "\xff\xff\xff\xff", 30 * time.Second},
		{codes.ServiceUnavailable, "", 0},
		{codes.TooManyRequests, "", 0},
		{codes.InternalServerError, "\x05", -1},
	} {
		busy := func(code codes.Code) *coap.Store {
			return openPeer(t, coap.Options{}, func(_ int, p *peer) {
				p.serve(code, func(m coaptest.Message) []byte {
					return coaptest.Stream(v.code, m.Token, coaptest.Option(nil, 0, message.MaxAge, v.age), "")
				})
			})
		}
		_, getError := get(t, busy(codes.GET), ref, eris.BlockSize1KiB)
		failures := []error{getError}
		if v.want != 0 { // see TestLimited
			failures = append(failures, busy(codes.PUT).Put(t.Context(), ref, block))
		}
		for _, err := range failures {
			busy, ok := errors.AsType[*fetch.BusyError](err)
			if ok != (v.want >= 0) || ok && busy.After != v.want {
				t.Errorf("%d, %q: error %v", v.code, v.age, err)
			}
			response.check(t, err)
		}
	}
}

// TestLimited puts blocks into a peer that refuses more than some requests at a time, and says for
// how long or not: all of them are stored, although all are put at the same time. One that refuses
// everything is given up, after few requests.
func TestLimited(t *testing.T) {
	for _, most := range []int64{0, 2, 5} {
		for age, code := range map[string]codes.Code{"": codes.TooManyRequests, "\x01": codes.ServiceUnavailable} {
			t.Run(fmt.Sprintf("%d at a time, later %q", most, age), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var now, stored, refused atomic.Int64
					store := openInNetwork(t, coap.Options{}, func(_ int, p *peer) {
						var group sync.WaitGroup
						defer group.Wait()
						p.write(csm)
						for {
							m, ok := p.readUntil(codes.PUT)
							if !ok {
								return
							}
							group.Go(func() {
								defer now.Add(-1)
								if now.Add(1) > most {
									refused.Add(1)
									p.write(coaptest.Stream(code, m.Token, coaptest.Option(nil, 0, message.MaxAge, age), ""))
									return
								}
								time.Sleep(time.Millisecond)
								stored.Add(1)
								p.write(coaptest.Stream(codes.Created, m.Token, nil, ""))
							})
						}
					})
					const blocks = 60
					var group sync.WaitGroup
					for i := range blocks {
						group.Go(func() {
							ref, block := newBlock(eris.BlockSize1KiB, i)
							if err := store.Put(t.Context(), ref, block); (err == nil) != (most > 0) {
								t.Error(err)
							}
						})
					}
					group.Wait()
					if n := refused.Load(); stored.Load() < blocks && most > 0 || n == 0 || n > 2*blocks {
						t.Errorf("%d are stored, %d requests were refused", stored.Load(), n)
					}
				})
			})
		}
	}
}

// TestHostile has peers that do not keep to the protocol where it is about answers to us; package
// coapserver has those that break the framing, which is the same for both sides. Each call must
// come to its end, with an error of the right kind, in bounded time and memory, and the store must
// work again as soon as its peer does.
func TestHostile(t *testing.T) {
	ref1, block1 := newBlock(eris.BlockSize1KiB, 1)
	ref32, block32 := newBlock(eris.BlockSize32KiB, 2)
	fromHex := func(text string) []byte {
		b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
		must(t, err)
		return b
	}
	// respond sends what reply makes to the first GET, and its parts if it has any, and then goes
	// on as a good peer.
	respond := func(reply func(m coaptest.Message) []byte) func(*peer) {
		return func(p *peer) {
			first := true
			p.serve(codes.GET, func(m coaptest.Message) []byte {
				switch {
				case first || m.Block(message.Block2).Present:
					first = false
					return reply(m)
				case bytes.Contains(m.Body, []byte(ref1.String())):
					return answer(m, block1)
				}
				return answer(m, block32)
			})
		}
	}
	// part answers with the same part of so many bytes, whatever is asked for.
	part := func(part wire.Block, size int) func(*peer) {
		return respond(func(m coaptest.Message) []byte {
			return coaptest.Stream(codes.Content, m.Token, part.AppendOption(nil, 0, message.Block2), make([]byte, size))
		})
	}
	// flood sends the same bytes without end, once it has been asked.
	flood := func(b []byte) func(*peer) {
		return func(p *peer) {
			p.begin(codes.GET)
			var group sync.WaitGroup
			group.Go(func() { p.awaitEnd() })
			for p.write(bytes.Repeat(b, 100)) {
			}
			group.Wait()
		}
	}
	for _, v := range []struct {
		name   string
		play   func(p *peer)
		size   eris.BlockSize
		want   outcome
		aborts bool // the client must say so
	}{
		{"wrong bytes", respond(func(m coaptest.Message) []byte { return answer(m, make([]byte, 1024)) }), 1024, wrong, false},
		{"wrong bytes of 32 KiB", respond(func(m coaptest.Message) []byte { return answer(m, make([]byte, 32768)) }), 32768, wrong, false},
		{"one byte less", respond(func(m coaptest.Message) []byte { return answer(m, block1[:1023]) }), 1024, wrong, false},
		{"one byte more", respond(func(m coaptest.Message) []byte { return answer(m, append(block1[:1024:1024], 0)) }), 1024, wrong, false},
		{"one byte less of 32 KiB", respond(func(m coaptest.Message) []byte { return answer(m, block32[:32767]) }), 32768, wrong, false},
		{"one byte more of 32 KiB", respond(func(m coaptest.Message) []byte { return answer(m, append(block32[:32768:32768], 0)) }), 32768, wrong, false},
		{"the other size", respond(func(m coaptest.Message) []byte { return answer(m, block32) }), 1024, wrong, false},
		{"no payload", respond(func(m coaptest.Message) []byte { return answer(m, nil) }), 1024, wrong, false},
		{"as much as fits a message", respond(func(m coaptest.Message) []byte { return answer(m, make([]byte, 65500)) }), 32768, wrong, false},
		{"4.04", respond(func(m coaptest.Message) []byte { return coaptest.Stream(codes.NotFound, m.Token, nil, "") }), 1024, missing, false},
		{"5.03 with terminal codes", respond(func(m coaptest.Message) []byte {
			return coaptest.Stream(codes.ServiceUnavailable, m.Token, nil, "\x1b[2J\r\n"+strings.Repeat("x", 2000))
		}), 1024, response, false},
		{"2.04", respond(func(m coaptest.Message) []byte { return coaptest.Stream(codes.Changed, m.Token, nil, block1) }), 1024, response, false},
		{"unknown critical option", respond(func(m coaptest.Message) []byte {
			return coaptest.Stream(codes.Content, m.Token, coaptest.Option(nil, 0, 9, "x"), block1)
		}), 1024, fails, false},
		{"token with a zero before it", respond(func(m coaptest.Message) []byte {
			m.Token.Size++
			return answer(m, block1)
		}), 1024, fails, false},
		{"token that nobody has", respond(func(m coaptest.Message) []byte {
			m.Token.Value++
			return answer(m, block1)
		}), 1024, fails, false},
		{"never answers", func(p *peer) { p.write(csm); p.awaitEnd() }, 1024, fails, false},
		{"says nothing at all", func(p *peer) { p.awaitEnd() }, 1024, fails, false},
		{"closes when asked", func(p *peer) { p.write(csm); p.readUntil(codes.GET) }, 1024, fails, false},
		{"closes in the middle of an answer", func(p *peer) { p.write(answer(p.begin(codes.GET), block1)[:500]) }, 1024, fails, false},
		{"closes in the middle of a large answer", func(p *peer) { p.write(answer(p.begin(codes.GET), block32)[:20000]) }, 32768, fails, false},
		{"stops in the middle of an answer", func(p *peer) {
			p.write(answer(p.begin(codes.GET), block1)[:500])
			p.awaitEnd()
		}, 1024, fails, false},
		{"stops in the middle of a large answer", func(p *peer) {
			p.write(answer(p.begin(codes.GET), block32)[:20000])
			p.awaitEnd()
		}, 32768, fails, false},
		{"drips", func(p *peer) {
			m := p.begin(codes.GET)
			for _, b := range answer(m, block32) {
				if !p.write([]byte{b}) {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}, 32768, fails, false},
		{"reserved option", respond(func(m coaptest.Message) []byte { return coaptest.Stream(codes.Content, m.Token, []byte{0xf0}, "") }), 1024, fails, true},
		{"marker without payload", respond(func(m coaptest.Message) []byte { return coaptest.Stream(codes.Content, m.Token, []byte{0xff}, "") }), 1024, fails, true},
		{"large answer with malformed options", respond(func(m coaptest.Message) []byte {
			return coaptest.Stream(codes.Content, m.Token, bytes.Repeat([]byte{0x0f}, 20000), "")
		}), 32768, fails, true},
		{"large answer all of options", respond(func(m coaptest.Message) []byte {
			return coaptest.Stream(codes.Content, m.Token, make([]byte, 60000), "")
		}), 32768, wrong, false},
		{"large answer with many options", respond(func(m coaptest.Message) []byte {
			return coaptest.Stream(codes.Content, m.Token, make([]byte, 20000), block32)
		}), 32768, works, false},
		{"answer before capabilities", func(p *peer) {
			m, _ := p.readUntil(codes.GET)
			p.write(answer(m, block1))
			p.awaitEnd()
		}, 1024, fails, true},
		{"large answer before capabilities", func(p *peer) {
			m, _ := p.readUntil(codes.GET)
			p.write(answer(m, block32))
			p.awaitEnd()
		}, 32768, fails, true},
		{"Abort with terminal codes", respond(func(coaptest.Message) []byte { return coaptest.Stream(codes.Abort, wire.Token{}, nil, "\x1b[2J") }), 1024, fails, false},
		{"Release instead of an answer", respond(func(coaptest.Message) []byte { return fromHex("00 e4") }), 1024, fails, false},
		{"endless requests", flood(fromHex("01 01 07")), 1024, fails, false},
		{"endless parts of 16 bytes", respond(func(m coaptest.Message) []byte {
			part := m.Block(message.Block2)
			part.More, part.Exponent, part.Present = true, 0, true
			return coaptest.Stream(codes.Content, m.Token, part.AppendOption(nil, 0, message.Block2), make([]byte, 16))
		}), 1024, wrong, false},
		{"parts that do not go on", part(wire.Block{More: true, Exponent: 6}, 1024), 32768, fails, false},
		{"part of another length than it says", part(wire.Block{More: true, Exponent: 6}, 1000), 32768, fails, false},
		{"part from the end", part(wire.Block{Number: 1<<20 - 1, Exponent: 6}, 1024), 32768, fails, false},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			// The last words may take a quarter of a second, in which a busy machine may do something else.
			for range 5 {
				told := make(chan bool, 2)
				options := short
				if v.want != fails || v.aborts {
					options.RequestTimeout = 0 // it is not silence that ends the call
				}
				store := openPeer(t, options, func(connection int, p *peer) {
					if connection > 1 { // a call tries two
						p.serveBlock(map[eris.BlockSize][]byte{eris.BlockSize1KiB: block1, eris.BlockSize32KiB: block32}[v.size])
						return
					}
					v.play(p)
					if v.aborts {
						p.awaitEnd()
					}
					p.conn.Close()
					told <- p.aborted
				})
				ref := ref1
				if v.size == eris.BlockSize32KiB {
					ref = ref32
				}
				_, err := get(t, store, ref, v.size)
				v.want.check(t, err)
				recovers(t, store, ref, v.size)
				if !v.aborts || <-told {
					return
				}
			}
			t.Error("the peer was not told why")
		})
	}
}

// recovers checks that a store works again.
func recovers(t *testing.T, store *coap.Store, ref eris.Reference, size eris.BlockSize) {
	t.Helper()
	var err error
	for range 600 {
		if _, err = get(t, store, ref, size); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("the store does not work again: %v", err)
}

// TestAnswersTwice has a peer answer everything twice: no answer may go to a call that it is not
// for.
func TestAnswersTwice(t *testing.T) {
	blocks := make(map[eris.Reference][]byte)
	var refs []eris.Reference
	for i := range 200 {
		ref, block := newBlock(eris.BlockSize1KiB, i)
		blocks[ref] = block
		refs = append(refs, ref)
	}
	store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
		p.serve(codes.GET, func(m coaptest.Message) []byte {
			ref, _ := eris.ParseReference(m.Options[message.URIQuery][0])
			return bytes.Repeat(answer(m, blocks[ref]), 2)
		})
	})
	for range 3 {
		for _, ref := range refs {
			if got, err := get(t, store, ref, eris.BlockSize1KiB); err != nil || !bytes.Equal(got, blocks[ref]) {
				t.Fatalf("Get: %v", err)
			}
		}
	}
}

// TestOneNeverAnswered has a peer that answers all requests but one: it condemns the connection in
// the end.
func TestOneNeverAnswered(t *testing.T) {
	lost, _ := newBlock(eris.BlockSize1KiB, 1)
	ref, block := newBlock(eris.BlockSize1KiB, 2)
	store := openPeer(t, coap.Options{RequestTimeout: 20 * time.Millisecond}, func(_ int, p *peer) {
		p.serve(codes.GET, func(m coaptest.Message) []byte {
			if m.Options[message.URIQuery][0] != ref.String() {
				return nil
			}
			return answer(m, block)
		})
	})
	var over atomic.Bool
	var group sync.WaitGroup
	group.Go(func() {
		for !over.Load() {
			get(t, store, ref, eris.BlockSize1KiB)
		}
	})
	_, err := get(t, store, lost, eris.BlockSize1KiB)
	fails.check(t, err)
	over.Store(true)
	group.Wait()
}

// TestSlowParts has a peer that answers each request in time, but sends a block in so many parts
// that this would take minutes.
func TestSlowParts(t *testing.T) {
	ref, _ := newBlock(eris.BlockSize32KiB, 1)
	reply := func(part wire.Block) (options, payload []byte) {
		part.More, part.Exponent, part.Present = true, 0, true
		time.Sleep(50 * time.Millisecond)
		return part.AppendOption(nil, 0, message.Block2), make([]byte, 16)
	}
	stream := playPeer(t, func(_ int, p *peer) {
		p.serve(codes.GET, func(m coaptest.Message) []byte {
			options, payload := reply(m.Block(message.Block2))
			return coaptest.Stream(codes.Content, m.Token, options, payload)
		})
	})
	datagrams := datagramPeer(t, func(m coaptest.Message) [][]byte {
		options, payload := reply(m.Block(message.Block2))
		return [][]byte{coaptest.Datagram(message.Acknowledgement, codes.Content, m.ID, m.Token, options, payload)}
	})
	for _, url := range []string{stream, datagrams} {
		store := mustOpen(t, url, short)
		_, err := get(t, store, ref, eris.BlockSize32KiB)
		fails.check(t, err)
		store.Close()
	}
}

// TestSilentOnce checks that a peer that has never answered is not asked twice for one block, and
// soon given up if it says nothing at all; and that one that has answered is asked again: the
// connection may have died without anybody having been told.
func TestSilentOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testSilentOnce)
}

func testSilentOnce(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	var asked atomic.Int32
	silent := openInNetwork(t, coap.Options{}, func(_ int, p *peer) {
		p.write(csm)
		for {
			if _, ok := p.readUntil(codes.GET); !ok {
				return
			}
			asked.Add(1)
		}
	})
	_, err := get(t, silent, ref, eris.BlockSize1KiB)
	fails.check(t, err)
	if n := asked.Load(); n != 1 {
		t.Errorf("the peer was asked %d times", n)
	}
	mute := openInNetwork(t, coap.Options{DialTimeout: time.Second}, func(_ int, p *peer) { p.awaitEnd() })
	_, err = get(t, mute, ref, eris.BlockSize1KiB)
	for _, err := range []error{err, mute.Put(t.Context(), ref, block)} {
		if fails.check(t, err); err == nil || !strings.Contains(err.Error(), "it accepts connections, and says nothing") {
			t.Errorf("error is %v", err)
		}
	}
	falls := openInNetwork(t, coap.Options{RequestTimeout: 2 * time.Second}, func(connection int, p *peer) {
		if connection > 0 {
			p.serveBlock(block)
			return
		}
		m := p.begin(codes.GET)
		p.write(answer(m, block))
		p.awaitEnd()
	})
	for range 2 {
		_, err := get(t, falls, ref, eris.BlockSize1KiB)
		works.check(t, err)
	}
}

// TestAway has a store be out of reach, which has taken blocks, while one is put.
func TestAway(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	for away, want := range map[time.Duration]outcome{25 * time.Second: works, 40 * time.Second: fails} {
		synctest.Test(t, func(t *testing.T) {
			var network sourcetest.Network
			var returns time.Time
			listener, play := network.Listen(), script(func(_ int, p *peer) {
				p.write(csm)
				for {
					m, ok := p.readUntil(codes.PUT)
					if !ok || !p.write(coaptest.Stream(codes.Created, m.Token, nil, "")) {
						return
					}
				}
			})
			serveOn(t, listener, play.run(t))
			store := mustOpen(t, "coap+tcp://192.0.2.1", coap.Options{Dial: func(ctx context.Context) (net.Conn, error) {
				if time.Now().Before(returns) {
					return nil, syscall.ECONNREFUSED
				}
				return network.Dial(ctx, "tcp", listener.Addr().String())
			}})
			defer store.Close()
			works.check(t, store.Put(t.Context(), ref, block))
			store.Renew()
			synctest.Wait()
			returns = time.Now().Add(away)
			began := time.Now()
			want.check(t, store.Put(t.Context(), ref, block))
			if took := time.Since(began); took > 35*time.Second {
				t.Errorf("away for %v: it took %v", away, took)
			}
		})
	}
}

// TestStoodStill has this process be stopped while it connects: the time was not the peer's.
func TestStoodStill(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	synctest.Test(t, func(t *testing.T) {
		var network sourcetest.Network
		listener, play := network.Listen(), script(func(_ int, p *peer) { p.serveBlock(block) })
		serveOn(t, listener, play.run(t))
		stopped := false
		store := mustOpen(t, "coap+tcp://192.0.2.1", coap.Options{Dial: func(ctx context.Context) (net.Conn, error) {
			if !stopped {
				stopped = true
				<-ctx.Done()
				time.Sleep(time.Minute)
				return nil, ctx.Err()
			}
			return network.Dial(ctx, "tcp", listener.Addr().String())
		}})
		defer store.Close()
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		works.check(t, err)
	})
}

// TestRenew gives up a connection on which a peer that has answered says nothing more: what is
// under way is requested on another one.
func TestRenew(t *testing.T) {
	ref, block := newBlock(eris.BlockSize1KiB, 1)
	asked := make(chan struct{})
	store := openPeer(t, coap.Options{}, func(connection int, p *peer) {
		if connection > 0 {
			p.serveBlock(block)
			return
		}
		m := p.begin(codes.GET)
		p.write(answer(m, block))
		p.readUntil(codes.GET)
		close(asked)
		p.awaitEnd()
	})
	_, err := get(t, store, ref, eris.BlockSize1KiB)
	works.check(t, err)
	ended := make(chan error)
	go func() {
		_, err := get(t, store, ref, eris.BlockSize1KiB)
		ended <- err
	}()
	<-asked
	store.Renew()
	works.check(t, <-ended)
}

// TestCancelWithinAnswer ends a call of which half the answer has come: the memory is given back at
// once, although the rest does not come, and the connection goes on when it does.
func TestCancelWithinAnswer(t *testing.T) {
	ref, block := newBlock(eris.BlockSize32KiB, 1)
	other, otherBlock := newBlock(eris.BlockSize1KiB, 2)
	half, rest := make(chan struct{}), make(chan struct{})
	var connections atomic.Int32
	store := openPeer(t, coap.Options{}, func(_ int, p *peer) {
		connections.Add(1)
		m := p.begin(codes.GET)
		b := answer(m, block)
		p.write(b[:16000])
		close(half)
		<-rest
		p.write(b[16000:])
		p.serveBlock(otherBlock)
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	memory := make([]byte, 32768)
	done := make(chan error)
	go func() {
		_, err := fetch.Get(ctx, store, ref, eris.BlockSize32KiB, memory[:0])
		done <- err
	}()
	<-half
	time.Sleep(20 * time.Millisecond) // for the reader to be within the payload: not needed for the test to pass
	cause := errors.New("given up")
	cancel(cause)
	if err := <-done; !errors.Is(err, cause) {
		t.Errorf("error is %v", err)
	}
	for i := range memory {
		memory[i] = 0x5a
	}
	close(rest)
	for range 3 {
		if _, err := get(t, store, other, eris.BlockSize1KiB); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(memory, bytes.Repeat([]byte{0x5a}, 32768)) {
		t.Error("memory was written to after Get had returned")
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestBackoff counts the connections to a peer that closes each at once, while somebody does not
// stop to ask.
func TestBackoff(t *testing.T) {
	ref, _ := newBlock(eris.BlockSize1KiB, 1)
	var connections atomic.Int32
	store := openPeer(t, coap.Options{}, func(int, *peer) { connections.Add(1) })
	var group sync.WaitGroup
	begin := time.Now()
	for range 8 {
		group.Go(func() {
			for time.Since(begin) < time.Second {
				_, err := get(t, store, ref, eris.BlockSize1KiB)
				fails.check(t, err)
			}
		})
	}
	group.Wait()
	// At 0, 100, 300, 700, 1500 ms and so on; the last calls may have waited for one more.
	if n := connections.Load(); n > 7 {
		t.Errorf("%d connections in a second", n)
	}
}

// TestAcceptsAndStaysSilent has a peer that accepts connections and neither reads nor writes, so
// that not even TLS or WebSockets get anywhere. Nothing may hold up Cancel or Close.
func TestAcceptsAndStaysSilent(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	for _, scheme := range []string{"coap+tcp", "coaps+tcp", "coap+ws", "coaps+ws", "coap"} {
		store := mustOpen(t, scheme+"://"+listener.Addr().String(), coap.Options{RequestTimeout: time.Hour, DialTimeout: time.Hour})
		ref, block := newBlock(eris.BlockSize32KiB, 1)
		done := make(chan *fetch.Request, 4000)
		var requests []*fetch.Request
		for range cap(done) {
			r := &fetch.Request{Size: eris.BlockSize32KiB, Dst: make([]byte, 0, 32<<10), Done: func(r *fetch.Request) { done <- r }}
			r.Pair.Reference = ref
			requests = append(requests, r)
			store.Start(r)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		put := make(chan error, 1)
		go func() { put <- store.Put(ctx, ref, block) }()
		for _, r := range requests[:len(requests)/2] {
			store.Cancel(r)
		}
		for range len(requests) / 2 {
			if r := <-done; scheme != "coap" && !errors.Is(r.Err, context.Canceled) {
				t.Errorf("%s: %v", scheme, r.Err)
			}
		}
		cause := errors.New("given up")
		cancel(cause)
		if err := <-put; scheme != "coap" && !errors.Is(err, cause) {
			t.Errorf("%s: Put: %v", scheme, err)
		}
		store.Close()
		for range len(requests) / 2 {
			if r := <-done; r.Err == nil {
				t.Errorf("%s: a request has succeeded", scheme)
			}
		}
	}
}

// TestNothingListens checks that the error says what to do.
func TestNothingListens(t *testing.T) {
	store := mustOpen(t, "coap+unix://"+filepath.Join(t.TempDir(), "s"), coap.Options{})
	defer store.Close()
	ref, _ := newBlock(eris.BlockSize1KiB, 1)
	if _, err := get(t, store, ref, eris.BlockSize1KiB); err == nil || !strings.Contains(err.Error(), "nothing listens there") {
		t.Errorf("error is %v", err)
	}
}

// inParts is a connection that answers the first request by a part of a block, before it has said
// that it takes the request.
type inParts struct {
	*wire.Conn
	next      chan *wire.Exchange // is requested
	cancelled chan struct{}       // closed when the first request has been
}

func (c *inParts) State() (answered bool, err error) { return true, nil }

func (c *inParts) Start(x *wire.Exchange) bool {
	if x.Block.Present {
		c.next <- x
		return true
	}
	x.Code, x.Length, x.Response.Block2 = codes.Content, 1024, wire.Block{More: true, Exponent: wire.MaxExponent, Present: true}
	x.Done(x)
	<-c.cancelled
	return true
}

func (c *inParts) Cancel(x *wire.Exchange) {
	if x.Block.Present {
		x.Err = context.Canceled
		x.Done(x)
	}
}

// TestCancelBetweenParts cancels a request of which parts have come already, but which has not been
// started altogether.
func TestCancelBetweenParts(t *testing.T) {
	ref, _ := newBlock(eris.BlockSize32KiB, 1)
	store := mustOpen(t, "coap+tcp://127.0.0.1:1", coap.Options{})
	defer store.Close()
	c := &inParts{next: make(chan *wire.Exchange), cancelled: make(chan struct{})}
	coap.SetConnection(store, c)
	done := make(chan struct{})
	r := &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize32KiB, Dst: make([]byte, 0, eris.BlockSize32KiB), Done: func(*fetch.Request) { close(done) }}
	go store.Start(r)
	<-c.next
	store.Cancel(r)
	close(c.cancelled)
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("it goes on")
	}
}
