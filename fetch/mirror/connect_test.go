// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
)

// silentAddress makes a loopback address neither take nor refuse connections at a port: its queue
// is full.
func silentAddress(t *testing.T, address string, port int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	to := &unix.SockaddrInet4{Port: port, Addr: netip.MustParseAddr(address).As4()}
	if err := unix.Bind(fd, to); err != nil {
		t.Skipf("no second loopback address: %v", err)
	}
	must(t, unix.Listen(fd, 0))
	for range 3 {
		filler, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		must(t, err)
		t.Cleanup(func() { unix.Close(filler) })
		if err := unix.Connect(filler, to); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
	}
}

// TestDeadAddresses connects to addresses that are silent.
func TestDeadAddresses(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	defer server.Close()
	at := server.Listener.Addr().(*net.TCPAddr)
	silentAddress(t, "127.0.0.79", at.Port)
	silent := fmt.Sprintf("http://127.0.0.79:%d/nar", at.Port)
	c := client(t, mirror.Options{})
	// One that is given up while it is connected to.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.OpenNar(ctx, silent); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if err := c.Down(silent); err != nil {
		t.Errorf("it rests: %v", err)
	}
	hasty := client(t, mirror.Options{ConnectTimeout: 50 * time.Millisecond})
	if _, err := hasty.OpenNar(t.Context(), silent); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("error %v", err)
	}
	if hasty.Down(silent) == nil {
		t.Error("it does not rest")
	}
	if err := hasty.Narinfos(t.Context(), fmt.Sprintf("http://127.0.0.78:%d", at.Port), []string{"x"}, nil); err == nil || !strings.Contains(err.Error(), "127.0.0.78") {
		t.Errorf("error %v", err)
	}
}
