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
	if r := bytes.NewReader(nil); ratelimit.Reader(t.Context(), r, nil) != io.Reader(r) {
		t.Error("a reader without limit is wrapped")
	}
}

func TestTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ratelimit.New(1000, 500)
		wait := func(n int) time.Duration {
			d := max(0, l.Take(n))
			time.Sleep(d)
			return d
		}
		about(t, "the burst", wait(500), 0)
		about(t, "what follows", wait(100), 100*time.Millisecond)
		about(t, "more than the burst", wait(2000), 2*time.Second)
		time.Sleep(time.Hour)
		about(t, "after a pause, the burst", wait(500), 0)
		about(t, "after a pause, what follows", wait(500), 500*time.Millisecond)
		l.Return(300)
		about(t, "what was given back", wait(300), 0)
		about(t, "what was not", wait(100), 100*time.Millisecond)
		l.Return(1 << 30) // no more than the burst
		about(t, "the burst, given back", wait(500), 0)
		about(t, "what follows it", wait(100), 100*time.Millisecond)
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
				for ctx.Err() == nil {
					time.Sleep(l.Take(1 << 10))
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
		if total < 10<<10-20 || total > 10<<10+len(counts)+1 {
			t.Errorf("%d KiB went in 10 s at 1 MiB/s", total)
		}
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

// TestConn checks that what is sent on several connections and a socket goes as slowly as is said,
// that who waits for that is not late, and that closing ends the waiting.
func TestConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := ratelimit.New(1000, 1)
		start := time.Now()
		var written, reading sync.WaitGroup
		var conns []net.Conn
		for range 2 {
			near, far := net.Pipe()
			c := ratelimit.Conn(near, l)
			conns = append(conns, c)
			reading.Go(func() { io.Copy(io.Discard, far) })
			written.Go(func() {
				c.SetDeadline(time.Now().Add(time.Second))
				if n, err := c.Write(make([]byte, 10_000)); n != 10_000 || err != nil {
					t.Errorf("%d bytes, %v", n, err)
				}
			})
		}
		p := ratelimit.PacketConn(nowhere{}, l)
		for range 10 {
			written.Go(func() { p.WriteTo(make([]byte, 1000), nil) })
		}
		written.Wait()
		about(t, "30 kB at 1 kB/s", time.Since(start), 30*time.Second)
		for _, c := range conns {
			time.AfterFunc(time.Second, func() { c.Close() })
			written.Go(func() {
				if _, err := c.Write(make([]byte, 20_000)); !errors.Is(err, net.ErrClosed) {
					t.Errorf("writing to what is closed: %v", err)
				}
			})
		}
		written.Wait()
		reading.Wait()
		about(t, "all", time.Since(start), 31*time.Second)
		if ratelimit.Conn(conns[0], nil) != conns[0] || ratelimit.Listener(nil, nil) != nil || ratelimit.PacketConn(p, nil) != p {
			t.Error("what has no limit is wrapped")
		}
	})
}

// nowhere is a socket that sends nothing.
type nowhere struct{ net.PacketConn }

func (nowhere) WriteTo(b []byte, _ net.Addr) (int, error) { return len(b), nil }
