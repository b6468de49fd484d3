// SPDX-License-Identifier: GPL-3.0-or-later

package link_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/lines/link"
)

// start serves every connection by f, behind a link.
func start(t testing.TB, network string, up, down link.Direction, f func(net.Conn)) *link.Link {
	address, listen := "127.0.0.1:0", ""
	if network == "unix" {
		d := t.TempDir()
		address, listen = filepath.Join(d, "server"), filepath.Join(d, "link")
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer c.Close()
				f(c)
			})
		}
	})
	l, err := link.New(network, listen, listener.Addr().String(), up, down)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		listener.Close()
		group.Wait()
	})
	return l
}

func dial(t testing.TB, network string, l *link.Link) net.Conn {
	c, err := net.Dial(network, l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func echo(c net.Conn) { io.Copy(c, c) }

// TestPasses sends bytes there and back, and the end as well.
func TestPasses(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			up, down := link.Symmetric(10*time.Millisecond, 50<<20)
			l := start(t, network, up, down, echo)
			c := dial(t, network, l)
			want := make([]byte, 3<<20)
			rand.Read(want)
			go func() {
				c.Write(want)
				c.(interface{ CloseWrite() error }).CloseWrite()
			}()
			begin := time.Now()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes came back: %v", len(got), err)
			}
			// Not faster than the line is; how much slower says nothing here.
			if least := 10*time.Millisecond + time.Second*3/50; time.Since(begin) < least {
				t.Errorf("took %v, less than %v", time.Since(begin), least)
			}
			if up, down := l.Bytes(); up != int64(len(want)) || down != up {
				t.Errorf("%d bytes up, %d down", up, down)
			}
		})
	}
}

// TestDelay checks that a byte there and back takes a round trip at least.
func TestDelay(t *testing.T) {
	up, down := link.Symmetric(60*time.Millisecond, 0)
	c := dial(t, "tcp", start(t, "tcp", up, down, echo))
	begin := time.Now()
	c.Write([]byte{1})
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d < 60*time.Millisecond {
		t.Errorf("a round trip took %v", d)
	}
}

// TestLoss checks that lost packets come late, but whole and in order.
func TestLoss(t *testing.T) {
	c := dial(t, "tcp", start(t, "tcp", link.Direction{Delay: time.Millisecond}, link.Direction{Delay: time.Millisecond, Loss: 0.2}, echo))
	want := make([]byte, 200_000)
	rand.Read(want)
	go c.Write(want)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("something else came back: %v", err)
	}
}

func TestCut(t *testing.T) {
	l := start(t, "tcp", link.Direction{}, link.Direction{CutAfter: 1000}, echo)
	c := dial(t, "tcp", l)
	c.Write(make([]byte, 5000))
	if got, _ := io.ReadAll(c); len(got) != 1000 {
		t.Errorf("%d bytes came before the cut", len(got))
	}
	other := dial(t, "tcp", l)
	other.Write(make([]byte, 10))
	if _, err := io.ReadFull(other, make([]byte, 10)); err != nil {
		t.Error(err)
	}
	l.Cut()
	if _, err := io.ReadFull(other, make([]byte, 1)); err == nil {
		t.Error("a connection that was cut goes on")
	}
}

func TestStall(t *testing.T) {
	l := start(t, "tcp", link.Direction{}, link.Direction{StallAfter: 1000}, echo)
	c := dial(t, "tcp", l)
	c.Write(make([]byte, 5000))
	if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	silent(t, c)

	other := dial(t, "tcp", l)
	l.Stall(true)
	other.Write(make([]byte, 10))
	silent(t, other)
	l.Stall(false)
	other.SetReadDeadline(time.Time{})
	if _, err := io.ReadFull(other, make([]byte, 10)); err != nil {
		t.Error(err)
	}
}

// silent checks that nothing comes, nor the end.
func silent(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes came: %v", n, err)
	}
}

// BenchmarkThroughput sends one way, and reports which part of the rate was reached, and how much
// processor time a GB takes.
func BenchmarkThroughput(b *testing.B) {
	for _, rate := range []int64{2 << 20, 25e6, 125e6, 0} {
		name := "unbounded"
		if rate > 0 {
			name = map[int64]string{2 << 20: "17Mbit", 25e6: "200Mbit", 125e6: "1Gbit"}[rate]
		}
		b.Run(name, func(b *testing.B) {
			total := rate / 2
			if rate == 0 {
				total = 1 << 30
			}
			up, down := link.Symmetric(20*time.Millisecond, rate)
			l := start(b, "tcp", up, down, func(c net.Conn) {
				buffer := make([]byte, 256<<10)
				for left := total; left > 0; {
					n, err := c.Write(buffer[:min(left, int64(len(buffer)))])
					if err != nil {
						return
					}
					left -= int64(n)
				}
			})
			b.SetBytes(total)
			for b.Loop() {
				c := dial(b, "tcp", l)
				begin := time.Now()
				n, err := io.Copy(io.Discard, c)
				if err != nil || n != total {
					b.Fatalf("%d bytes: %v", n, err)
				}
				if rate > 0 {
					b.ReportMetric(float64(total)/float64(rate)/(time.Since(begin)-20*time.Millisecond).Seconds(), "ofrate")
				}
				c.Close()
			}
		})
	}
}
