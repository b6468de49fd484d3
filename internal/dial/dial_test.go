// SPDX-License-Identifier: GPL-3.0-or-later

package dial_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
)

// TestUnanswered connects by a name where a DNS server answers questions about some kinds of
// addresses only.
func TestUnanswered(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for name, test := range map[string]struct {
		answered []dnsmessage.Type
		ok       bool
	}{
		"all":     {[]dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}, true},
		"no IPv6": {[]dnsmessage.Type{dnsmessage.TypeA}, true},
		"none":    {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := nameServer(t, test.answered)
			connect := dial.With(&net.Dialer{Resolver: &net.Resolver{
				PreferGo: true,
				Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "udp", server)
				},
			}})
			// A resolver waits five seconds for an answer, twice.
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			conn, err := connect(ctx, "tcp", "server.example.:"+port)
			if err == nil {
				conn.Close()
			}
			if _, ofName := errors.AsType[*net.DNSError](err); (err == nil) != test.ok || ofName == test.ok {
				t.Errorf("error %v", err)
			}
		})
	}
}

// nameServer knows the address 127.0.0.1 of each name, and answers questions of some types.
func nameServer(t *testing.T, answered []dnsmessage.Type) string {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil {
				continue
			}
			answer(conn, from, m, answered)
		}
	}()
	return conn.LocalAddr().String()
}

func answer(conn net.PacketConn, to net.Addr, m dnsmessage.Message, answered []dnsmessage.Type) {
	q := m.Questions[0]
	for _, kind := range answered {
		if kind != q.Type {
			continue
		}
		m.Response, m.Additionals = true, nil
		if kind == dnsmessage.TypeA {
			m.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
				Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
			}}
		}
		if b, err := m.Pack(); err == nil {
			conn.WriteTo(b, to)
		}
	}
}
