// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestResolve checks the order of addresses and what is said about dead names.
func TestResolve(t *testing.T) {
	addresses := func(s ...string) (list []netip.Addr) {
		for _, a := range s {
			list = append(list, netip.MustParseAddr(a))
		}
		return list
	}
	c := NewClient(Options{ConnectTimeout: 20 * time.Millisecond})
	defer c.Close()
	for _, test := range []struct{ found, want []netip.Addr }{
		{addresses("::ffff:1.2.3.4"), addresses("1.2.3.4")},
		{addresses("2001:db8::1", "2001:db8::2", "1.2.3.4", "5.6.7.8"), addresses("2001:db8::1", "1.2.3.4", "2001:db8::2", "5.6.7.8")},
		{addresses("1.1.1.1", "1.1.1.2", "1.1.1.3", "::1"), addresses("1.1.1.1", "::1", "1.1.1.2", "1.1.1.3")},
		{slices.Repeat(addresses("1.1.1.1"), 100), slices.Repeat(addresses("1.1.1.1"), maxAddresses)},
	} {
		c.lookup = func(context.Context, string, string) ([]netip.Addr, error) { return test.found, nil }
		if got, err := c.resolve(t.Context(), "example.org"); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%v: %v, error %v; want %v", test.found, got, err, test.want)
		}
	}
	for _, test := range []struct {
		lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
		want   string
	}{
		{func(ctx context.Context, _, _ string) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }, "no answer within"},
		{func(context.Context, string, string) ([]netip.Addr, error) { return nil, nil }, "no address"},
		{func(context.Context, string, string) ([]netip.Addr, error) {
			return nil, &net.DNSError{Err: "no such host", Name: "example.org"}
		}, "host name lookup: no such host"},
	} {
		c.lookup = test.lookup
		_, err := c.OpenNar(t.Context(), "http://example.org/nar")
		var failure *ServerError
		if !errors.As(err, &failure) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("error %v, want %q", err, test.want)
		}
		if c.Down("http://example.org/") == nil {
			t.Error("it would be asked again")
		}
		c.peers = map[string]*peer{}
	}
}

// silentAddress makes a loopback address neither take nor refuse connections at a
// port: its queue is full.
func silentAddress(t *testing.T, address string, port int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	to := &unix.SockaddrInet4{Port: port, Addr: netip.MustParseAddr(address).As4()}
	if err := unix.Bind(fd, to); err != nil {
		t.Skipf("no second loopback address: %v", err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		filler, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(filler) })
		if err := unix.Connect(filler, to); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
	}
}

// TestDeadAddresses connects to a server some of whose addresses are dead.
func TestDeadAddresses(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	defer server.Close()
	at := server.Listener.Addr().(*net.TCPAddr)
	silentAddress(t, "127.0.0.79", at.Port)
	c := NewClient(Options{})
	defer c.Close()
	found := func(list ...string) {
		c.lookup = func(context.Context, string, string) (addresses []netip.Addr, err error) {
			for _, a := range list {
				addresses = append(addresses, netip.MustParseAddr(a))
			}
			return addresses, nil
		}
	}
	found("127.0.0.79", "127.0.0.77", "127.0.0.1") // silent, refusing, good
	n, err := c.OpenNar(t.Context(), fmt.Sprintf("http://example.org:%d/nar", at.Port))
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	found("127.0.0.77", "127.0.0.78")
	if _, err := c.OpenNar(t.Context(), fmt.Sprintf("http://dead.example.org:%d/nar", at.Port)); err == nil || !strings.Contains(err.Error(), "127.0.0.77") {
		t.Errorf("error %v", err)
	}
	// One that is given up while it is connected to.
	found("127.0.0.79")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	silent := fmt.Sprintf("http://silent.example.org:%d/nar", at.Port)
	if _, err := c.OpenNar(ctx, silent); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if err := c.Down(silent); err != nil {
		t.Errorf("it would not be asked again: %v", err)
	}
	hasty := NewClient(Options{ConnectTimeout: 50 * time.Millisecond})
	defer hasty.Close()
	hasty.lookup = c.lookup
	if _, err := hasty.OpenNar(t.Context(), silent); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("error %v", err)
	}
}
