// SPDX-License-Identifier: GPL-3.0-or-later

package wire

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"
)

// start returns a wire, or skips the test.
func start(t *testing.T, o Options) *Wire {
	t.Helper()
	w, err := New(o)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		t.Skipf("no network namespaces: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

// TestWire sends something through a wire and back. Bytes must come as they were, whatever is lost
// on the way, and not before they can.
func TestWire(t *testing.T) {
	sent := make([]byte, 2e6)
	for i, random := 0, rand.New(rand.NewPCG(3, 4)); i < len(sent); i++ {
		sent[i] = byte(random.Uint32())
	}
	for name, o := range map[string]Options{
		"free":  {},
		"slow":  {RoundTrip: 20 * time.Millisecond, Rate: 10e6},
		"lossy": {RoundTrip: 2 * time.Millisecond, Rate: 50e6, Loss: 0.01},
		"full":  {RoundTrip: 10 * time.Millisecond, Rate: 10e6, Queue: 20e3},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t, o)
			listener, err := w.Listen()
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				io.Copy(conn, conn)
			}()
			begin := time.Now()
			var conn net.Conn
			if err := w.Near(func() (err error) {
				conn, err = net.DialTimeout("tcp", listener.Addr().String(), 10*time.Second)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			go func() {
				conn.Write(sent)
				conn.(*net.TCPConn).CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("got %d bytes of %d, other ones or %v", len(got), len(sent), err)
			}
			took := time.Since(begin)
			// One round trip for the connection, one for the first byte, and the rest at the rate.
			least := 2 * o.RoundTrip
			if o.Rate > 0 {
				least += time.Duration(float64(len(sent)) / float64(o.Rate) * float64(time.Second))
			}
			up, down := w.Traffic()
			t.Logf("took %v, at least %v; up %+v, down %+v", took, least, up, down)
			if took < least {
				t.Errorf("took %v, which cannot be less than %v", took, least)
			}
			if up.Bytes < int64(len(sent)) || down.Bytes < int64(len(sent)) {
				t.Errorf("%d bytes were delivered up, and %d down", up.Bytes, down.Bytes)
			}
			if name == "lossy" && up.Lost+down.Lost == 0 {
				t.Error("nothing was lost")
			}
		})
	}
}

// TestSeparate checks that nothing else can be reached from within a namespace.
func TestSeparate(t *testing.T) {
	w := start(t, Options{})
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	err = w.Near(func() error {
		conn, err := net.DialTimeout("tcp", outside.Addr().String(), time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	})
	if err == nil {
		t.Error("a namespace reaches the loopback interface of the machine")
	}
}

// TestSetTCPMemory checks that it changes the namespace only.
func TestSetTCPMemory(t *testing.T) {
	w := start(t, Options{})
	const file = "/proc/sys/net/ipv4/tcp_wmem"
	before, err := os.ReadFile(file)
	if err != nil {
		t.Skip(err)
	}
	var inside []byte
	if err := w.Far(func() (err error) {
		if err := SetTCPMemory(12345678, 23456789); err != nil {
			return err
		}
		inside, err = os.ReadFile(file)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("of the machine: %q instead of %q (%v)", after, before, err)
	}
	if !bytes.Contains(inside, []byte("23456789")) {
		t.Errorf("of the namespace: %q", inside)
	}
}
