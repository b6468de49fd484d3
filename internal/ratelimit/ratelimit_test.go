// SPDX-License-Identifier: GPL-3.0-or-later

package ratelimit_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// about fails unless a time is a planned one, to a hundredth.
func about(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	if (got - want).Abs() > want/100+time.Millisecond {
		t.Errorf("%s took %v instead of %v", what, got, want)
	}
}

func TestNoLimit(t *testing.T) {
	for _, rate := range []int64{0, -1, math.MinInt64} {
		if ratelimit.New(rate, 1) != nil {
			t.Errorf("there is a limit of %d", rate)
		}
	}
	var l *ratelimit.Limiter
	if err := l.WaitN(t.Context(), math.MaxInt); err != nil {
		t.Error(err)
	}
	l.Return(1)
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if ratelimit.Conn(a, nil, nil) != a || ratelimit.Reader(t.Context(), a, nil) != io.Reader(a) {
		t.Error("a connection without limit is wrapped")
	}
	listener := &pipes{}
	if ratelimit.Listener(listener, nil, nil) != net.Listener(listener) {
		t.Error("a listener without limit is wrapped")
	}
	socket := newDatagrams()
	if ratelimit.PacketConn(socket, nil, nil) != net.PacketConn(socket) {
		t.Error("a socket without limit is wrapped")
	}
	if n := testing.AllocsPerRun(100, func() { l.WaitN(context.Background(), 1000) }); n != 0 {
		t.Errorf("no limit allocates %v times", n)
	}
}

func TestWaitN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		l := ratelimit.New(1000, 500)
		wait := func(n int) time.Duration {
			t.Helper()
			before := time.Now()
			if err := l.WaitN(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			return time.Since(before)
		}
		about(t, "the burst", wait(500), 0)
		about(t, "what follows", wait(100), 100*time.Millisecond)
		about(t, "more than the burst", wait(2000), 2*time.Second)
		about(t, "nothing", wait(0)+wait(-5), 0)
		time.Sleep(time.Hour)
		about(t, "after a pause, the burst", wait(500), 0)
		about(t, "after a pause, what follows", wait(500), 500*time.Millisecond)
		l.Return(300)
		about(t, "what was given back", wait(300), 0)
		about(t, "what was not", wait(100), 100*time.Millisecond)
		l.Return(1 << 40) // no more than the burst
		about(t, "the burst, given back", wait(500), 0)
		about(t, "what follows it", wait(100), 100*time.Millisecond)
		about(t, "all", time.Since(start), time.Hour+100*time.Millisecond+2*time.Second+700*time.Millisecond)
	})
}

// Users of one limiter get equal shares, and together what the limit is.
func TestShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ratelimit.New(1<<20, 1<<10)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var group sync.WaitGroup
		var counts [20]int
		for i := range counts {
			group.Go(func() {
				for l.WaitN(ctx, 1<<10) == nil {
					counts[i]++
				}
			})
		}
		group.Wait()
		total := 0
		for i, n := range counts {
			if n < 500 || n > 520 {
				t.Errorf("user %d had %d turns", i, n)
			}
			total += n
		}
		if total < 10<<10-20 || total > 10<<10+1 {
			t.Errorf("%d KiB went in 10 s at 1 MiB/s", total)
		}
	})
}

// Who gives up does not use the rate, and is told why at once.
func TestWaitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ratelimit.New(1000, 1)
		reason := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(reason) })
		start := time.Now()
		if err := l.WaitN(ctx, 1<<40); !errors.Is(err, reason) {
			t.Error(err)
		}
		about(t, "giving up", time.Since(start), time.Second)
		if err := l.WaitN(ctx, 1); !errors.Is(err, reason) {
			t.Error(err)
		}
		start = time.Now()
		if err := l.WaitN(t.Context(), 1001); err != nil {
			t.Error(err)
		}
		about(t, "the next", time.Since(start), time.Second)
	})
}

func TestReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := bytes.Repeat([]byte("0123456789"), 100_000)
		start := time.Now()
		r := ratelimit.Reader(t.Context(), bytes.NewReader(data), ratelimit.New(100_000, 0))
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		about(t, "1 MB at 100 kB/s", time.Since(start), 10*time.Second-328*time.Millisecond) // the burst is 32 KiB

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		got, err = io.ReadAll(ratelimit.Reader(ctx, bytes.NewReader(data), ratelimit.New(1000, 1)))
		if !errors.Is(err, context.DeadlineExceeded) || len(got) == 0 || !bytes.HasPrefix(data, got) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		about(t, "giving up", time.Since(start), time.Second)
	})
}

// Both directions of a connection have their limits, and nothing is lost.
func TestConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		limited := ratelimit.Conn(near, ratelimit.New(50_000, 1), ratelimit.New(200_000, 1))
		data := bytes.Repeat([]byte("0123456789"), 100_000)
		var group sync.WaitGroup
		start := time.Now()
		group.Go(func() {
			if n, err := limited.Write(data); n != len(data) || err != nil {
				t.Error(n, err)
			}
			about(t, "writing 1 MB at 200 kB/s", time.Since(start), 5*time.Second)
		})
		group.Go(func() {
			got := make([]byte, len(data))
			if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, data) {
				t.Error(err)
			}
		})
		group.Go(func() {
			if n, err := far.Write(data); n != len(data) || err != nil {
				t.Error(n, err)
			}
			far.Close()
		})
		got, err := io.ReadAll(limited)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		about(t, "reading 1 MB at 50 kB/s", time.Since(start), 20*time.Second)
		group.Wait()
		if err := limited.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Close ends waiting, and what has been read is not lost by that.
func TestConnEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		slow := ratelimit.New(1, 1)
		limited := ratelimit.Conn(near, slow, slow)
		go far.Write([]byte("0123456789"))
		var group sync.WaitGroup
		start := time.Now()
		group.Go(func() {
			buffer := make([]byte, 100)
			if n, err := limited.Read(buffer); n != 10 || err != nil {
				t.Errorf("%q, %v", buffer[:n], err)
			}
			about(t, "reading until it is closed", time.Since(start), time.Second)
		})
		group.Go(func() {
			if n, err := limited.Write(make([]byte, 5000)); n != 0 || !errors.Is(err, net.ErrClosed) {
				t.Error(n, err)
			}
			about(t, "writing until it is closed", time.Since(start), time.Second)
		})
		time.Sleep(time.Second)
		limited.Close()
		group.Wait()
	})
}

// pipes is a listener of connections in memory.
type pipes struct{ conns chan net.Conn }

func (p *pipes) Accept() (net.Conn, error) {
	c, ok := <-p.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (p *pipes) Close() error   { close(p.conns); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{} }

// All connections of a listener share a limit.
func TestListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := &pipes{make(chan net.Conn)}
		listener := ratelimit.Listener(below, nil, ratelimit.New(100_000, 1))
		var group sync.WaitGroup
		start := time.Now()
		for range 4 {
			near, far := net.Pipe()
			group.Go(func() {
				n, err := io.Copy(io.Discard, far)
				if n != 250_000 || err != nil {
					t.Error(n, err)
				}
			})
			go func() { below.conns <- near }()
			c, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			group.Go(func() {
				defer c.Close()
				if _, err := c.Write(make([]byte, 250_000)); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		about(t, "4 connections, 1 MB, at 100 kB/s", time.Since(start), 10*time.Second)
		listener.Close()
		if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
}

// datagrams is a socket in memory, which receives what it sends.
type datagrams struct {
	net.PacketConn
	queue  chan []byte
	closed chan struct{}
}

func newDatagrams() *datagrams {
	return &datagrams{queue: make(chan []byte, 1000), closed: make(chan struct{})}
}

func (d *datagrams) ReadFrom(p []byte) (int, net.Addr, error) {
	select {
	case b := <-d.queue:
		return copy(p, b), &net.UDPAddr{}, nil
	case <-d.closed:
		return 0, nil, net.ErrClosed
	}
}
func (d *datagrams) WriteTo(p []byte, _ net.Addr) (int, error) {
	d.queue <- bytes.Clone(p)
	return len(p), nil
}
func (d *datagrams) Close() error { close(d.closed); return nil }

func TestPacketConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newDatagrams()
		c := ratelimit.PacketConn(below, ratelimit.New(10_000, 1), ratelimit.New(100_000, 1))
		start := time.Now()
		for range 100 {
			if n, err := c.WriteTo(make([]byte, 1000), nil); n != 1000 || err != nil {
				t.Fatal(n, err)
			}
		}
		about(t, "sending 100 kB at 100 kB/s", time.Since(start), time.Second)
		start = time.Now()
		buffer := make([]byte, 2000)
		for range 100 {
			if n, from, err := c.ReadFrom(buffer); n != 1000 || from == nil || err != nil {
				t.Fatal(n, from, err)
			}
		}
		about(t, "receiving 100 kB at 10 kB/s", time.Since(start), 10*time.Second)
		time.AfterFunc(time.Second, func() { c.Close() })
		if n, err := c.WriteTo(make([]byte, 1<<20), nil); n != 0 || !errors.Is(err, net.ErrClosed) {
			t.Error(n, err)
		}
	})
}
