// SPDX-License-Identifier: GPL-3.0-or-later

package dial_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestStoodStill has this process be stopped while it connects: the time was not the server's.
func TestStoodStill(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	testhelp.Must(t, err)
	defer l.Close()
	for name, test := range map[string]struct {
		stopped time.Duration
		times   int32
		ok      bool
	}{
		"stopped": {3 * time.Second, 1, true},
		"slow":    {0, 100, false},
	} {
		var tried atomic.Int32
		connect := dial.With(&net.Dialer{
			Timeout: time.Second,
			ControlContext: func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
				if tried.Add(1) <= test.times {
					<-ctx.Done()
					time.Sleep(test.stopped)
				}
				return ctx.Err()
			},
		})
		conn, err := connect(t.Context(), "tcp", l.Addr().String())
		for try := 1; try < 5 && err != nil && test.ok; try++ { // it may have been stopped once more
			tried.Store(0)
			conn, err = connect(t.Context(), "tcp", l.Addr().String())
		}
		if (err == nil) != test.ok {
			t.Errorf("%s: error %v", name, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

// TestChangedNetwork has the first connection get no answer, as where it was begun before a change
// of network.
func TestChangedNetwork(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	testhelp.Must(t, err)
	defer l.Close()
	var tried atomic.Int32
	connect := dial.With(&net.Dialer{
		Timeout: time.Minute,
		ControlContext: func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
			if tried.Add(1) == 1 {
				<-ctx.Done()
			}
			return ctx.Err()
		},
	})
	began := time.Now()
	conn, err := connect(t.Context(), "tcp", l.Addr().String())
	testhelp.Must(t, err)
	conn.Close()
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestUnanswered connects by a name where a DNS server answers questions about some kinds of
// addresses only, and at some of the addresses, all but the last, nobody answers.
func TestUnanswered(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	testhelp.Must(t, err)
	t.Cleanup(func() { l.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for name, test := range map[string]struct {
		answered []dnsmessage.Type
		dead     int
		ok       bool
	}{
		"all":            {[]dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}, 0, true},
		"no IPv6":        {[]dnsmessage.Type{dnsmessage.TypeA}, 0, true},
		"none":           {nil, 0, false},
		"dead addresses": {[]dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}, 5, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := nameServer(t, test.answered, test.dead)
			connect := dial.With(&net.Dialer{
				Resolver: resolver(func() string { return server }),
				ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
					if !strings.HasPrefix(address, "127.0.0.1:") {
						<-ctx.Done() // nobody answers there
					}
					return ctx.Err()
				},
			})
			// A resolver waits five seconds for an answer, twice, and a dialer two for an address.
			most := 9 * time.Second
			if !test.ok {
				most = 3 * time.Second
			}
			try := func() (net.Conn, error) {
				ctx, cancel := context.WithTimeout(t.Context(), most)
				defer cancel()
				return connect(ctx, "tcp", "server.example.:"+port)
			}
			conn, err := try()
			for more := 4; more > 0 && err != nil && test.ok; more-- { // the machine may be busy
				conn, err = try()
			}
			if err == nil {
				conn.Close()
			}
			if _, ofName := errors.AsType[*net.DNSError](err); (err == nil) != test.ok || ofName == test.ok {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestAnswered asks a store by UDP where the name has addresses at which nothing listens, and one
// at which nobody answers, before that of the server.
func TestAnswered(t *testing.T) {
	socket, err := net.ListenPacket("udp4", "127.0.0.1:0")
	testhelp.Must(t, err)
	server := wire.NewEndpoint(socket, wire.EndpointConfig{})
	var group sync.WaitGroup
	group.Go(func() { server.Run() })
	defer group.Wait()
	defer server.Close(net.ErrClosed)
	_, port, _ := net.SplitHostPort(socket.LocalAddr().String())
	silent, err := net.ListenPacket("udp4", "127.0.0.3:"+port)
	testhelp.Must(t, err)
	defer silent.Close()

	defaultServer.Store(nameServer(t, []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}, 4))
	store, err := coap.Open("coap://server.example.:"+port, coap.Options{})
	testhelp.Must(t, err)
	defer store.Close()
	if _, err := fetch.Get(t.Context(), store, eris.Reference{}, eris.BlockSize1KiB, make([]byte, 1024)); !errors.Is(err, eris.ErrNotFound) {
		t.Errorf("error %v", err)
	}
}

// defaultServer is the name server of dialers that have no resolver of their own.
var defaultServer atomic.Value

func init() { net.DefaultResolver = resolver(func() string { return defaultServer.Load().(string) }) }

// resolver asks a server of its own.
func resolver(server func() string) *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "udp", server())
		},
	}
}

// nameServer knows the address 127.0.0.1 of each name after some others, and answers questions of
// some types.
func nameServer(t *testing.T, answered []dnsmessage.Type, dead int) string {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	testhelp.Must(t, err)
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
			answer(conn, from, m, answered, dead)
		}
	}()
	return conn.LocalAddr().String()
}

func answer(conn net.PacketConn, to net.Addr, m dnsmessage.Message, answered []dnsmessage.Type, dead int) {
	q := m.Questions[0]
	for _, kind := range answered {
		if kind != q.Type {
			continue
		}
		m.Response, m.Additionals = true, nil
		if kind == dnsmessage.TypeA {
			for i := range dead + 1 {
				a := [4]byte{127, 0, 0, byte(1 + dead - i)}
				m.Answers = append(m.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
					Body:   &dnsmessage.AResource{A: a},
				})
			}
		}
		if b, err := m.Pack(); err == nil {
			conn.WriteTo(b, to)
		}
	}
}
