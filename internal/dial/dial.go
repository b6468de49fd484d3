// SPDX-License-Identifier: GPL-3.0-or-later

// Package dial connects to servers by their names.
package dial

import (
	"cmp"
	"context"
	"net"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
)

const (
	// lookupTime is for how long a lookup of both kinds of addresses is waited for before each kind
	// is looked up for itself as well.
	lookupTime = 500 * time.Millisecond
	// nextAfter is for how long an address is waited for before the next one is tried as well (RFC
	// 8305, section 5). A dialer does so with the two kinds only.
	nextAfter = 300 * time.Millisecond
	// againAfter is for how long a connection is waited for before another one is tried as well: one
	// that was begun before a change of network has an address from before.
	againAfter = 3 * time.Second
	// stoodStill is by how much a call of Within exceeds its time only if this process was stopped
	// meanwhile.
	stoodStill = time.Second
)

// With is DialContext of a dialer that is soon through with what has no answer: addresses of a name
// at which the server is not, and questions about one kind of them, mostly of IPv6, which some
// routers drop; a lookup of both takes longer than a server may have then. Names that end in
// ".local" are looked up on the local network, too. The time of the dialer is that for all
// addresses, as in [Within]. What is read by TCP is acknowledged at once. Errors are those of the
// dialer.
func With(d *net.Dialer) func(ctx context.Context, network, address string) (net.Conn, error) {
	connect := WithAnswer(d, nil)
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := connect(ctx, network, address)
		return acknowledging(conn), err
	}
}

// WithAnswer is With for networks that make no connections, and for TCP as it is: of a name with
// several addresses, it takes the one at which the server answers first. For that, answers is to
// ask whoever the socket is connected to until there is an answer, an error, or the context ends,
// and to close it.
func WithAnswer(d *net.Dialer, answers func(context.Context, net.Conn) error) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return Within(ctx, cmp.Or(d.Timeout, time.Hour), func(ctx context.Context) (net.Conn, error) {
			return once(ctx, d, answers, network, address)
		})
	}
}

// Within calls f with a context that ends after some time, and once more if that has passed while
// this process was stopped.
func Within[T any](ctx context.Context, timeout time.Duration, f func(ctx context.Context) (T, error)) (T, error) {
	for again := false; ; again = true {
		began := time.Now()
		within, cancel := context.WithTimeout(ctx, timeout)
		result, err := f(within)
		cancel()
		if err == nil || again || ctx.Err() != nil || time.Since(began) <= timeout+stoodStill {
			return result, err
		}
	}
}

func once(ctx context.Context, d *net.Dialer, answers func(context.Context, net.Conn) error, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	var looking, several atomic.Bool
	found := make(chan []net.IPAddr, 3)
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		DNSStart: func(httptrace.DNSStartInfo) { looking.Store(true) },
		DNSDone: func(info httptrace.DNSDoneInfo) {
			looking.Store(false)
			if len(info.Addrs) > 1 {
				several.Store(true)
			}
			found <- info.Addrs
		},
	})
	results, running := make(chan dialed), 0
	defer func() {
		cancel()
		for ; running > 0; running-- {
			if late := <-results; late.err == nil {
				late.conn.Close()
			}
		}
	}()
	start := func(ctx context.Context, d *net.Dialer, kind, address string) {
		running++
		go func() {
			conn, err := d.DialContext(ctx, network+kind, address)
			if err == nil && answers != nil && several.Load() {
				if err = answers(ctx, conn); err == nil { // more answers may be under way to that socket
					conn, err = d.DialContext(ctx, network, conn.RemoteAddr().String())
				}
			}
			results <- dialed{conn, ctx == traced && kind == "", err}
		}()
	}
	host, port, _ := net.SplitHostPort(address)
	name := strings.TrimSuffix(host, ".")
	local := strings.HasSuffix(strings.ToLower(name), ".local")
	several.Store(local)
	start(traced, d, "", address)
	if local {
		near := *d
		near.Resolver = lan.Resolver()
		start(ctx, &near, "4", net.JoinHostPort(name+".", port))
		start(ctx, &near, "6", net.JoinHostPort(name+".", port))
	}
	var others []net.IPAddr
	learn := func(addresses []net.IPAddr) {
		begun := map[bool]bool{} // the dialer begins with one of each kind, without connections with one
		for _, a := range addresses {
			if kind := answers != nil || a.IP.To4() == nil; begun[kind] {
				others = append(others, a)
			} else {
				begun[kind] = true
			}
		}
	}
	startOther := func() {
		if len(others) > 0 {
			start(ctx, d, "", net.JoinHostPort(others[0].String(), port))
			others = others[1:]
		}
	}
	var failed error
	late, again, next := time.After(lookupTime), time.After(againAfter), time.NewTicker(nextAfter)
	defer next.Stop()
	for running > 0 {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				return r.conn, nil
			}
			if r.first {
				failed = r.err
			}
			select {
			case addresses := <-found:
				learn(addresses)
			default:
			}
			if running == 0 {
				startOther()
			}
		case addresses := <-found:
			learn(addresses)
			next.Reset(nextAfter)
		case <-next.C:
			startOther()
		case <-again:
			if !looking.Load() {
				start(ctx, d, "", address)
			}
		case <-late:
			if looking.Load() {
				start(traced, d, "4", address)
				start(traced, d, "6", address)
			}
		}
	}
	return nil, failed
}

// dialed is the result of one address, or, first, of the name.
type dialed struct {
	conn  net.Conn
	first bool
	err   error
}

// acknowledging has Linux acknowledge at once what is read from a TCP connection. Otherwise it
// waits up to 40 ms for more, and a server that does not set TCP_NODELAY, such as one written in
// Python, holds its next small response, or what follows the header, back as long (RFC 9293,
// sections 3.7.4 and 3.8.6.3). Others stay as they are.
func acknowledging(conn net.Conn) net.Conn {
	if tcp, ok := conn.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			return acknowledged{tcp, raw}
		}
	}
	return conn
}

type acknowledged struct {
	*net.TCPConn
	raw syscall.RawConn
}

// Read implements net.Conn. Linux forgets the option when something is sent.
func (c acknowledged) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	c.raw.Control(acknowledge)
	return n, err
}

func acknowledge(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) }
