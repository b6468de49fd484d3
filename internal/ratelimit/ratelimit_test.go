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
	listener := make(pipes)
	if ratelimit.Listener(listener, nil, nil) != net.Listener(listener) {
		t.Error("a listener without limit is wrapped")
	}
	socket := datagrams{}
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

// accept returns the connection that a listener with limits accepts from another one.
func accept(t *testing.T, conn net.Conn, in, out *ratelimit.Limiter) net.Conn {
	below := make(pipes, 1)
	below <- conn
	c, err := ratelimit.Listener(below, in, out).Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Both directions of a connection have their limits, and nothing is lost.
func TestConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		limited := accept(t, near, ratelimit.New(50_000, 1), ratelimit.New(200_000, 1))
		data := bytes.Repeat([]byte("0123456789"), 100_000)
		transfer := func(what string, from, to net.Conn, want time.Duration) func() {
			return func() {
				start := time.Now()
				sent := make(chan error)
				go func() {
					_, err := from.Write(data)
					sent <- err
				}()
				got := make([]byte, len(data))
				if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, data) {
					t.Error(err)
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
				about(t, what, time.Since(start), want)
			}
		}
		var group sync.WaitGroup
		group.Go(transfer("writing 1 MB at 200 kB/s", limited, far, 5*time.Second))
		group.Go(transfer("reading 1 MB at 50 kB/s", far, limited, 20*time.Second))
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
		limited := accept(t, near, slow, slow)
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
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) { return <-p, nil }
func (p pipes) Close() error              { return nil }
func (p pipes) Addr() net.Addr            { return &net.UnixAddr{} }

// datagrams is a socket in memory, which receives what it sends.
type datagrams struct {
	net.PacketConn
	queue chan []byte
}

func (d datagrams) ReadFrom(p []byte) (int, net.Addr, error) {
	return copy(p, <-d.queue), &net.UDPAddr{}, nil
}

func (d datagrams) WriteTo(p []byte, _ net.Addr) (int, error) {
	d.queue <- bytes.Clone(p)
	return len(p), nil
}

func (d datagrams) Close() error { return nil }

func TestPacketConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := datagrams{queue: make(chan []byte, 1000)}
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
