// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"net"
	"strings"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
)

// TestParseEndpoint checks what becomes of URLs, about which package storeurl has more tests.
func TestParseEndpoint(t *testing.T) {
	for _, v := range []struct{ url, want string }{
		{"coap+tcp://127.0.0.1:5683", "coap+tcp://127.0.0.1:5683 (get)"},
		{"coap+tcp://[::]:0?get&put", "coap+tcp://[::]:0 (get, put)"},
		{"coap+tcp://:5683", "coap+tcp://:5683 (get)"},
		{"coap://[fe80::1%25eth0]:7/?get", "coap://[fe80::1%25eth0]:7 (get)"},
		{"COAP://host?put", "coap://host:5683 (put)"},
		{"coap+ws://host", "coap+ws://host:80 (get)"},
		{"http://host:8080/?get&put", "http://host:8080 (get, put)"},
		{"coap+unix:///run/a%20b?get", "coap+unix:///run/a%20b (get)"},
		{"coap+unix:///run/a", "coap+unix:///run/a (get, put)"},
	} {
		e, err := parseEndpoint(v.url)
		if got := e.String(); err != nil || got != v.want {
			t.Errorf("%s: %q, want %q; %v", v.url, got, v.want, err)
		}
	}
	if e, err := parseEndpoint("https://host"); err == nil {
		t.Errorf("%v is something to listen on", e)
	}
}

// TestZone listens at an address of this machine with a zone, without which nobody would find it.
func TestZone(t *testing.T) {
	host := ""
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		addresses, _ := i.Addrs()
		for _, a := range addresses {
			if n, ok := a.(*net.IPNet); ok && n.IP.To4() == nil && n.IP.IsLinkLocalUnicast() {
				host = n.IP.String() + "%" + i.Name
			}
		}
	}
	s := publishSettings{listen: host}
	l, err := s.open()
	if host == "" || err != nil {
		t.Skip("there is no link-local address", err)
	}
	defer l.Close()
	if !strings.HasPrefix(l.Addr().String(), "["+host+"]:") {
		t.Error(l.Addr())
	}
	e, err := parseEndpoint("coap+tcp://[" + strings.ReplaceAll(host, "%", "%25") + "]:0")
	if err == nil {
		err = e.listen(socketRights{})
	}
	must(t, err)
	defer e.close()
	if !strings.HasPrefix(e.address, "["+host+"]:") {
		t.Error(e.address)
	}
}

// TestAnswerFromThere asks a server that listens at all addresses by UDP, with a limit and without,
// at each address of this machine: the answer must come from there.
func TestAnswerFromThere(t *testing.T) {
	for _, url := range []string{"coap://0.0.0.0:0", "coap://:0"} {
		for _, limiter := range []*ratelimit.Limiter{nil, ratelimit.New(1<<30, 0)} {
			e, err := parseEndpoint(url)
			if err == nil {
				err = e.listen(socketRights{})
			}
			must(t, err)
			e.limit(limiter)
			server := coapserver.New(coapserver.Config{})
			done := make(chan error)
			go func() { done <- server.ServePacket(e.packets, e.Access) }()
			for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
				_, port, _ := net.SplitHostPort(e.address)
				if host == "::1" && url != "coap://:0" {
					continue
				}
				conn, err := net.Dial("udp", net.JoinHostPort(host, port))
				if err != nil {
					t.Logf("%s cannot be asked: %v", host, err) // there may be no IPv6
					continue
				}
				conn.Write([]byte("\x40\x00\x12\x34")) // a ping
				conn.SetReadDeadline(time.Now().Add(time.Minute))
				answer := make([]byte, 16)
				if n, err := conn.Read(answer); string(answer[:n]) != "\x70\x00\x12\x34" {
					t.Errorf("%s, asked at %s: answer %x, %v", url, host, answer[:n], err)
				}
				conn.Close()
			}
			server.Close()
			must(t, <-done)
		}
	}
}
