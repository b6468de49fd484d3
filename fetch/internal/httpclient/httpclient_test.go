// SPDX-License-Identifier: GPL-3.0-or-later

package httpclient

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

// newClient returns a client whose timeouts are all the same, until the test ends.
func newClient(t *testing.T, base *url.URL, connections int, timeout time.Duration) *Client {
	c := New(base, Options{Connections: connections, ConnectTimeout: timeout, Timeout: timeout, BodyTimeout: timeout, IdleTimeout: timeout})
	t.Cleanup(c.Close)
	return c
}

// inMemory is where the server of [serve] is.
var inMemory = &url.URL{Scheme: "http", Host: "192.0.2.1"}

// serve returns a client of a server in memory, for tests in a bubble, until the test ends.
func serve(t *testing.T, connections int, timeout time.Duration, handler http.HandlerFunc) *Client {
	var network sourcetest.Network
	l := network.Listen()
	server := &http.Server{Handler: handler}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	c := newClient(t, inMemory, connections, timeout)
	c.transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return network.Dial(ctx, "tcp", l.Addr().String())
	}
	return c
}

// TestAcknowledged has responses acknowledged at once: a server may wait for that with the rest.
func TestAcknowledged(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	base, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, base, 1, time.Minute)
	for range 20 {
		var used *conn
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { used = info.Conn.(*conn) }})
		err := c.Do(ctx, &http.Request{Method: "GET", URL: base, Header: Header()}, func(r *http.Response) error {
			_, err := io.Copy(io.Discard, r.Body)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := used.Conn.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if at, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK); at != 1 || err != nil {
				t.Errorf("not acknowledged at once: %v, %v", at, err)
			}
		})
	}
}

// Whether what a server says unasked comes before a request is sent or after that, it is no HTTP.
func TestUnasked(t *testing.T) {
	for _, before := range []bool{false, true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			if !before {
				c.Read(make([]byte, 1))
			}
			io.WriteString(c, "\x00\xe1\n")
			io.Copy(io.Discard, c) // until the client closes it
		}()
		base := &url.URL{Scheme: "http", Host: l.Addr().String()}
		c := newClient(t, base, 1, time.Minute)
		closed := false
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
			for before && !closed { // by net/http, which reads at once
				closed = info.Conn.SetDeadline(time.Time{}) != nil
				time.Sleep(time.Millisecond)
			}
		}})
		err = c.Do(ctx, &http.Request{Method: "GET", URL: base, Header: Header()}, func(*http.Response) error { return nil })
		if !errors.Is(err, errNotHTTP) || closed != before {
			t.Errorf("before %v: %v", before, err)
		}
	}
}

// TestAway has a server be away that has answered, while many requests are made, one of which does
// not wait for so long and says why it was in vain: the server refuses connections, closes them, or
// a proxy says that it does. It is asked seldom, and may be away for almost half a minute.
func TestAway(t *testing.T) {
	for _, how := range []string{"refuses", "closes", "proxy"} {
		for away, works := range map[time.Duration]bool{25 * time.Second: true, time.Minute: false} {
			synctest.Test(t, func(t *testing.T) {
				var returns time.Time
				var asked atomic.Int32
				c := serve(t, 10, time.Minute, func(w http.ResponseWriter, _ *http.Request) {
					if time.Now().Before(returns) {
						asked.Add(1)
						w.WriteHeader(http.StatusBadGateway)
					}
				})
				dial := c.transport.DialContext
				c.transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := dial(ctx, network, address)
					if err == nil && how != "proxy" && time.Now().Before(returns) {
						asked.Add(1)
						conn.Close()
						if how == "refuses" {
							return nil, syscall.ECONNREFUSED
						}
					}
					return conn, err
				}
				request := func(ctx context.Context) error {
					return c.Retry(ctx, func() error {
						return c.Do(ctx, &http.Request{Method: "PUT", URL: inMemory, Header: Header()}, func(r *http.Response) error {
							if r.StatusCode != http.StatusOK {
								return &StatusError{Code: r.StatusCode}
							}
							return nil
						})
					})
				}
				if err := request(t.Context()); err != nil {
					t.Fatal(err)
				}
				c.Renew()
				returns = time.Now().Add(away)
				began := time.Now()
				var group sync.WaitGroup
				group.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
					defer cancel()
					if err := request(ctx); err == nil || errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("%s, for ten seconds: %v", how, err)
					}
				})
				for range 200 {
					group.Go(func() {
						if err := request(t.Context()); (err == nil) != works {
							t.Errorf("%s, away for %v: %v", how, away, err)
						}
					})
				}
				group.Wait()
				if took, n := time.Since(began), asked.Load(); took > 35*time.Second || n > 1000 {
					t.Errorf("%s, away for %v: it took %v, and %d connections", how, away, took, n)
				}
			})
		}
	}
}

// TestStalled has a server begin an answer and not end it: that is one, and no lost connection.
func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		c := serve(t, 1, time.Second, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			w.WriteHeader(http.StatusInternalServerError)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := c.Retry(ctx, func() error {
			return c.Do(ctx, &http.Request{Method: "PUT", URL: inMemory, Header: Header()}, func(r *http.Response) error {
				_, err := io.Copy(io.Discard, r.Body)
				return err
			})
		})
		if n := asked.Load(); n != 1 || err == nil {
			t.Errorf("asked %d times: %v", n, err)
		}
	})
}
