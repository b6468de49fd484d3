// SPDX-License-Identifier: GPL-3.0-or-later

// Package dial connects to servers by their names.
package dial

import (
	"context"
	"net"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
)

// lookupTime is for how long a lookup of both kinds of addresses is waited for before each kind is
// looked up for itself as well.
const lookupTime = 500 * time.Millisecond

// With is DialContext of a dialer, also where questions about one kind of addresses, mostly of
// IPv6, have no answer: some routers drop these, and a lookup of both takes longer than a server
// may have then. Names that end in ".local" are looked up on the local network, too. Errors are
// those of the dialer.
func With(d *net.Dialer) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var looking atomic.Bool
		results := make(chan dialed, 5)
		var workers sync.WaitGroup
		left := 0
		start := func(ctx context.Context, d *net.Dialer, kind string) {
			left++
			workers.Go(func() {
				conn, err := d.DialContext(ctx, network+kind, address)
				results <- dialed{conn, kind, err}
			})
		}
		if host, _, _ := net.SplitHostPort(address); strings.HasSuffix(strings.ToLower(strings.TrimSuffix(host, ".")), ".local") {
			near := *d
			near.Resolver = lan.Resolver()
			start(ctx, &near, "4")
			start(ctx, &near, "6")
		}
		start(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
			DNSStart: func(httptrace.DNSStartInfo) { looking.Store(true) },
			DNSDone:  func(httptrace.DNSDoneInfo) { looking.Store(false) },
		}), d, "")
		var failed error
		late := time.After(lookupTime)
		for left > 0 {
			select {
			case r := <-results:
				if r.err == nil {
					cancel()
					workers.Wait()
					closeAll(results)
					return r.conn, nil
				}
				left--
				if r.kind == "" {
					failed = r.err
				}
			case <-late:
				if looking.Load() {
					start(ctx, d, "4")
					start(ctx, d, "6")
				}
			}
		}
		return nil, failed
	}
}

// dialed is the result of one kind of addresses.
type dialed struct {
	conn net.Conn
	kind string
	err  error
}

// closeAll closes the connections that came too late.
func closeAll(results chan dialed) {
	close(results)
	for r := range results {
		if r.err == nil {
			r.conn.Close()
		}
	}
}
