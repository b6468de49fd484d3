// SPDX-License-Identifier: GPL-3.0-or-later

package peers_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/peers"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// group is a group with the connections of its peers, whose other ends are played.
type group struct {
	*peers.Group
	source fetch.Source
	runs   sync.WaitGroup
	conns  []*coap.Conn
	liars  atomic.Value  // the last one
	leave  time.Duration // what it takes to close a connection
}

// leaving is a connection that takes leave, as those by TLS do.
type leaving struct {
	net.Conn
	leave time.Duration
}

func (l leaving) Close() error {
	time.Sleep(l.leave)
	return l.Conn.Close()
}

func newGroup() *group {
	g := &group{}
	g.Group = peers.New(func(host string, _ error) { g.liars.Store(host) })
	g.source = g.Source()
	return g
}

// close ends all connections.
func (g *group) close() {
	g.source.Close()
	for _, c := range g.conns {
		c.Close(errors.New("the test is over"))
	}
	g.runs.Wait()
}

// join adds a peer, played by a function, and returns its connection.
func (g *group) join(host string, play func(far net.Conn)) *coap.Conn {
	near, far := net.Pipe()
	c := coap.NewConn(leaving{near, g.leave}, coap.Config{Timeout: time.Minute, IdleTimeout: time.Hour, Window: 64, Pool: coap.NewPool()})
	ended := g.Join(c, host)
	g.conns = append(g.conns, c)
	g.runs.Go(func() {
		_ = c.Run()
		ended()
	})
	g.runs.Go(func() {
		play(far)
		far.Close()
	})
	return c
}

// store is a peer that has some blocks, right or wrong, and counts what it is asked.
type store struct {
	blocks map[eris.Reference][]byte
	asked  atomic.Int32
	delay  time.Duration
	has    func(prefix []byte) bool // what it says to have; nil if it cannot say
}

// knowing is a store that says what it has.
type knowing struct {
	*fetch.Workers
	has func(prefix []byte) bool
}

func (k knowing) Have(question []byte) []byte {
	return fetch.HaveBits(question, func(prefix []byte) (bool, bool) { return k.has(prefix), true })
}

func (s *store) play(far net.Conn) {
	source := fetch.NewWorkers("memory:", 1, func(_ context.Context, ref eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
		s.asked.Add(1)
		time.Sleep(s.delay)
		if block := s.blocks[ref]; len(block) == int(size) {
			return block, nil
		}
		return nil, eris.ErrNotFound
	})
	served := fetch.Source(source)
	if s.has != nil {
		served = knowing{source, s.has}
	}
	server := coapserver.New(coapserver.Config{Source: served, IdleTimeout: time.Hour})
	server.ServeConn(far, coapserver.Access{Get: true})
	source.Close()
}

func (g *group) get(t *testing.T, ref eris.Reference) ([]byte, error) {
	return fetch.Get(t.Context(), g.source, ref, eris.BlockSize1KiB, nil)
}

// want checks that a block can be had.
func (g *group) want(t *testing.T, ref eris.Reference, block []byte) {
	t.Helper()
	if got, err := g.get(t, ref); err != nil || !bytes.Equal(got, block) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestOrder checks that no block is asked of more than three peers, and that who has given one is
// asked first the next time.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		defer g.close()
		if _, err := g.get(t, eris.Reference{}); !errors.Is(err, eris.ErrNotFound) {
			t.Error(err)
		}
		giver := &store{blocks: map[eris.Reference][]byte{}}
		for range 50 {
			ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
			giver.blocks[ref] = block
		}
		var others [8]store
		asked := func() (n int32) {
			for i := range others {
				n += others[i].asked.Load()
			}
			return n
		}
		g.join("giver", giver.play)
		for i := range others {
			g.join(fmt.Sprint("other", i), others[i].play)
		}
		for range 3 { // in three rounds every one of the nine is asked
			before := asked() + giver.asked.Load()
			ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
			if _, err := g.get(t, ref); !errors.Is(err, eris.ErrNotFound) {
				t.Error(err)
			}
			if n := asked() + giver.asked.Load() - before; n != peers.MaxAsked {
				t.Errorf("%d peers were asked", n)
			}
		}
		if n := giver.asked.Load(); n != 1 {
			t.Errorf("a peer was asked %d times", n)
		}
		first := true
		for ref, block := range giver.blocks {
			before := asked()
			g.want(t, ref, block)
			if n := asked() - before; n > 0 && !first {
				t.Errorf("%d were asked before who has given all before", n)
			}
			first = false
		}
	})
}

// TestHave checks that the one of many peers who has a block is found, by about one request in
// vain, and that who claims what it does not have is asked little: everything, or all that is
// wanted.
func TestHave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		defer g.close()
		wanted := map[eris.Reference][]byte{}
		of := func(blocks map[eris.Reference][]byte) func(prefix []byte) bool {
			return func(prefix []byte) bool {
				for ref := range blocks {
					if bytes.HasPrefix(ref[:], prefix) {
						return true
					}
				}
				return false
			}
		}
		var owners [20]store
		for i := range owners {
			o := &owners[i]
			o.blocks = map[eris.Reference][]byte{}
			o.has = of(o.blocks)
			for range 5 {
				ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
				o.blocks[ref], wanted[ref] = block, block
			}
			g.join(fmt.Sprint("owner", i), o.play)
		}
		liars := [2]store{{has: func([]byte) bool { return true }}, {has: of(wanted)}}
		for i := range liars {
			g.join(fmt.Sprint("liar", i), liars[i].play)
		}
		var gets sync.WaitGroup
		i := 0
		for ref, block := range wanted { // half of them at the same time
			if i++; i < 50 {
				g.want(t, ref, block)
			} else {
				gets.Go(func() { g.want(t, ref, block) })
			}
		}
		gets.Wait()
		asked := int32(0)
		for i := range owners {
			asked += owners[i].asked.Load()
		}
		// Each liar is asked as one that cannot say, now and then; the second one has some claims
		// believed.
		if a, b := liars[0].asked.Load(), liars[1].asked.Load(); asked > 200 || a > 10 || b > 20 {
			t.Errorf("100 blocks took %d requests, and the liars got %d and %d", asked, a, b)
		}
	})
}

// TestConsumers checks that clients that make requests themselves are asked last, one for a block,
// and in the end not at all; and that two peers of one host do not count for more than one.
func TestConsumers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		defer g.close()
		consumer := func(far net.Conn) {
			c := coap.NewConn(far, coap.Config{Timeout: time.Minute, IdleTimeout: time.Hour, Window: 64, Pool: coap.NewPool()})
			done := make(chan struct{})
			c.Start(&coap.Exchange{Store: coap.NewDocument([]string{"some"}), Done: func(*coap.Exchange) { close(done) }})
			g.runs.Go(func() { <-done })
			_ = c.Run()
		}
		for i := range 20 {
			g.join(fmt.Sprint("consumer", i), consumer)
		}
		var twins [2]store
		for i := range twins {
			g.join("twins", twins[i].play)
		}
		synctest.Wait()
		for range 100 {
			ref, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
			before := twins[0].asked.Load() + twins[1].asked.Load()
			if _, err := g.get(t, ref); !errors.Is(err, eris.ErrNotFound) {
				t.Error(err)
			}
			if n := twins[0].asked.Load() + twins[1].asked.Load() - before; n != 1 {
				t.Errorf("%d peers of one host were asked", n)
			}
		}
	})
}

// TestLiar checks that a peer that gives wrong bytes is dropped, which nobody waits for, and that
// its host is not asked again when it is back, until later.
func TestLiar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		g.leave = 5 * time.Second
		defer g.close()
		ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
		second, secondBlock := sourcetest.NewBlock(eris.BlockSize1KiB)
		liar := &store{blocks: map[eris.Reference][]byte{ref: secondBlock, second: block}}
		c := g.join("liar", liar.play)
		time.Sleep(time.Second)
		begin := time.Now()
		if _, err := g.get(t, ref); !errors.Is(err, eris.ErrNotFound) || time.Since(begin) > time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		synctest.Wait()
		if _, err := c.State(); !errors.As(err, new(*eris.BlockError)) {
			t.Errorf("the connection ended by %v", err)
		}
		if g.liars.Load() != "liar" {
			t.Error("nobody is told of the liar")
		}
		honest := &store{blocks: map[eris.Reference][]byte{ref: block, second: secondBlock}}
		g.join("liar", liar.play)
		g.join("honest", honest.play)
		g.want(t, ref, block)
		g.want(t, second, secondBlock)
		if n := liar.asked.Load(); n != 1 {
			t.Errorf("the liar was asked %d times", n)
		}
		time.Sleep(11 * time.Minute)
		third, _ := sourcetest.NewBlock(eris.BlockSize1KiB)
		g.get(t, third)
		if n := liar.asked.Load(); n != 2 {
			t.Errorf("the liar was asked %d times after a while", n)
		}
		g.want(t, ref, block)
	})
}

// TestSilent checks that silent peers hold nobody up for long, and are left alone after that, and
// that one that answers slowly is not taken for silent.
func TestSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGroup()
		defer g.close()
		silent := func(far net.Conn) {
			far.Write(coaptest.CSM)
			for b := make([]byte, 1000); ; {
				if _, err := far.Read(b); err != nil {
					return
				}
			}
		}
		for i := range 3 {
			g.join(fmt.Sprint("silent", i), silent)
		}
		begin := time.Now()
		ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
		if _, err := g.get(t, ref); !errors.Is(err, eris.ErrNotFound) || time.Since(begin) > 1400*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		slow := &store{blocks: map[eris.Reference][]byte{ref: block}, delay: 100 * time.Millisecond}
		for range 14 {
			ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
			slow.blocks[ref] = block
		}
		g.join("slow", slow.play)
		begin = time.Now()
		var gets sync.WaitGroup
		for ref, block := range slow.blocks { // one after the other in the store of the peer: 1.5 s
			gets.Go(func() { g.want(t, ref, block) })
		}
		gets.Wait()
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("15 blocks took %v", took)
		}
	})
}
