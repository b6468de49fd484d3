// SPDX-License-Identifier: GPL-3.0-or-later

package mirror

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoNames has no server for names be reached.
func TestNoNames(t *testing.T) {
	at := net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 53}
	cause := &net.OpError{Op: "dial", Net: "udp", Addr: &at, Err: os.NewSyscallError("connect", unix.ENETUNREACH)}
	err := dialError(&net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{UnwrapErr: cause, Err: cause.Error(), Name: "x.example"}})
	if want := "host name lookup: connecting to 192.0.2.1:53: network is unreachable"; err.Error() != want {
		t.Errorf("%v", err)
	}
	l, err := parse("https://x.example/")
	if err != nil || l.shown() != "https://x.example" {
		t.Errorf("%v, %v", l, err)
	}
}
