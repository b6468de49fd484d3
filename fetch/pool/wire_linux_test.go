// SPDX-License-Identifier: GPL-3.0-or-later

package pool_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/wire"
)

// startWired makes a peer in a network namespace of its own, at the other end of a wire. Both ends have room for what is on the way,
// if tcpMemory, in bytes, says so; else they are as the kernel has them.
func startWired(tb testing.TB, blocks *memory, o wire.Options, tcpMemory int) (*peer, *wire.Wire) {
	w, err := wire.New(o)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		tb.Skipf("no network namespaces: %v", err)
	} else if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(w.Close)
	if tcpMemory > 0 {
		set := func() error { return wire.SetTCPMemory(tcpMemory, tcpMemory) }
		if err := errors.Join(w.Near(set), w.Far(set)); err != nil {
			tb.Skipf("no other memory for TCP: %v", err)
		}
	}
	listener, err := w.Listen()
	if err != nil {
		tb.Fatal(err)
	}
	s := newServer(tb, blocks)
	s.serve(listener)
	tb.Cleanup(s.stop)
	source := open(tb, s.address, coap.Options{Dial: func(ctx context.Context) (conn net.Conn, err error) {
		err = w.Near(func() (err error) {
			conn, err = new(net.Dialer).DialContext(ctx, "tcp", s.address)
			return err
		})
		return conn, err
	}})
	tb.Cleanup(func() { source.Close() })
	return &peer{roundTrip: o.RoundTrip, rate: o.Rate, source: source}, w
}

// TestWire reads through the TCP of the kernel, over wires that lose packets.
func TestWire(t *testing.T) {
	const length = 6e6
	for name, o := range map[string]wire.Options{
		"loss":  {RoundTrip: 5 * time.Millisecond, Rate: 20e6, Loss: 0.01},
		"queue": {RoundTrip: 10 * time.Millisecond, Rate: 20e6, Queue: 30e3},
	} {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			t.Run(fmt.Sprintf("%s/%v", name, size), func(t *testing.T) {
				blocks, c := encode(t, size, length)
				p, w := startWired(t, blocks, o, 0)
				r := read(t, sourcestate.Open(""), c, length, []*peer{p}, pool.Options{})
				up, down := w.Traffic()
				t.Log(r, up, down)
				if least := possible(length, float64(o.Rate)); r.took < least {
					t.Errorf("took %v, which cannot be less than %v", r.took, least)
				}
			})
		}
	}
}

// BenchmarkWire is [BenchmarkLine] with the TCP of the kernel at both ends: its windows, its slow start, its losses when the
// queue in front of the wire is full. Memory is what an administrator has allowed TCP to use for a connection: what the kernel has
// by itself, or enough for what is on the way.
func BenchmarkWire(b *testing.B) {
	for _, v := range []struct {
		size   eris.BlockSize
		rate   int64 // bytes per second
		length int64
		memory int
	}{
		{eris.BlockSize32KiB, 125e6, 500e6, 64 << 20}, {eris.BlockSize1KiB, 125e6, 500e6, 64 << 20}, {eris.BlockSize32KiB, 125e6, 500e6, 0},
		{eris.BlockSize32KiB, 25e6, 100e6, 0}, {eris.BlockSize1KiB, 25e6, 50e6, 0},
	} {
		var blocks *memory
		var c eris.ReadCapability
		memory := "tuned"
		if v.memory == 0 {
			memory = "plain"
		}
		for _, roundTrip := range []int{1, 20, 100, 300} {
			b.Run(fmt.Sprintf("%v/%dMbit/%s/%dms", v.size, v.rate/125e3, memory, roundTrip), func(b *testing.B) {
				if blocks == nil {
					blocks, c = encode(b, v.size, v.length)
				}
				p, w := startWired(b, blocks, wire.Options{RoundTrip: time.Duration(roundTrip) * time.Millisecond, Rate: v.rate}, v.memory)
				rate := float64(v.rate)
				for b.Loop() {
					state := sourcestate.Open("")
					for _, name := range []string{"cold", "warm"} {
						r := read(b, state, c, v.length, []*peer{p}, pool.Options{})
						b.ReportMetric(float64(v.length)/rate/r.took.Seconds(), name)
						b.ReportMetric(r.ofPossible(v.length, rate, c, roundTrip), name+"possible")
						if name == "warm" {
							b.ReportMetric(r.steady/rate, "steady")
						}
						up, down := w.Traffic()
						b.Log(name, r, up, down)
					}
				}
			})
		}
	}
}
