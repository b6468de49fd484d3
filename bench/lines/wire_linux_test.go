// SPDX-License-Identifier: GPL-3.0-or-later

package lines

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/wire"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// wired returns a peer in a network namespace of its own, at the other end of a wire. Both ends
// have room for what is on the way, if tcpMemory, in bytes, says so; else they are as the kernel
// has them.
func (all *blocks) wired(tb testing.TB, o wire.Options, tcpMemory int) *peer {
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
	address := serveOn(tb, listener, all.instant)
	dial := func(ctx context.Context) (conn net.Conn, err error) {
		err = w.Near(func() (err error) {
			conn, err = new(net.Dialer).DialContext(ctx, "tcp", address)
			return err
		})
		return conn, err
	}
	return &peer{address: address, options: coap.Options{Dial: dial}}
}

// TestWire reads through the TCP of the kernel, over wires that lose packets.
func TestWire(t *testing.T) {
	for name, o := range map[string]wire.Options{
		"loss":  {RoundTrip: 5 * time.Millisecond, Rate: 20e6, Loss: 0.01},
		"queue": {RoundTrip: 10 * time.Millisecond, Rate: 20e6, Queue: 30e3},
	} {
		for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
			t.Run(fmt.Sprintf("%s/%v", name, size), func(t *testing.T) {
				all := makeBlocks(size, 6e6)
				t.Log(all.read(t, sourcestate.Open(""), []*peer{all.wired(t, o, 0)}))
			})
		}
	}
}

// BenchmarkWire is [BenchmarkLine] with the TCP of the kernel at both ends: its windows, its slow
// start, its losses when the queue in front of the wire is full. Memory is what an administrator
// has allowed TCP to use for a connection: what the kernel has by itself, or enough for what is on
// the way.
func BenchmarkWire(b *testing.B) {
	for _, v := range []struct {
		size         eris.BlockSize
		rate, length int64 // bytes per second, and bytes
		memory       int
	}{
		{eris.BlockSize32KiB, 125e6, 500e6, 64 << 20},
		{eris.BlockSize1KiB, 125e6, 500e6, 64 << 20},
		{eris.BlockSize32KiB, 125e6, 500e6, 0},
		{eris.BlockSize32KiB, 25e6, 100e6, 0},
		{eris.BlockSize1KiB, 25e6, 50e6, 0},
	} {
		memory := "tuned"
		if v.memory == 0 {
			memory = "plain"
		}
		for _, roundTrip := range []int{1, 20, 100, 300} {
			b.Run(fmt.Sprintf("%v/%dMbit/%s/%dms", v.size, v.rate/125e3, memory, roundTrip), func(b *testing.B) {
				all := makeBlocks(v.size, v.length)
				o := wire.Options{RoundTrip: time.Duration(roundTrip) * time.Millisecond, Rate: v.rate}
				all.measure(b, v.length, float64(v.rate), []*peer{all.wired(b, o, v.memory)})
			})
		}
	}
}
