// SPDX-License-Identifier: GPL-3.0-or-later

package admission_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// client is a connection that only has an address.
type client struct {
	net.Conn
	address string
	closed  bool
}

func (c *client) RemoteAddr() net.Addr {
	if c.address == "" {
		return &net.UnixAddr{}
	}
	a, err := net.ResolveTCPAddr("tcp", c.address)
	if err != nil {
		panic(err)
	}
	return a
}

func (c *client) Close() error {
	c.closed = true
	return nil
}

func TestGate(t *testing.T) {
	g := admission.New(6, nil, new(admission.Counts), nil)
	var inside []*admission.Conn
	enter := func(address string, want bool) {
		t.Helper()
		c := &client{address: address}
		conn, ok := g.Enter(c)
		if ok != want || c.closed == want {
			t.Errorf("%q: let in %v, closed %v", address, ok, c.closed)
		}
		if ok {
			inside = append(inside, conn)
		}
	}
	enter("192.0.2.1:1", true)
	enter("192.0.2.1:2", true)
	enter("[::ffff:192.0.2.1]:3", true)
	enter("192.0.2.1:4", false)
	enter("192.0.2.2:1", true)
	enter("[2001:db8::1]:1", true)
	inside[0].Close()
	enter("192.0.2.1:4", true)
	enter("[2001:db8::2]:1", true)
	enter("[2001:db8:1::1]:1", false) // there are six
	if s := g.Stats(); s != (admission.Stats{Connections: 6, Accepted: 7, TurnedAway: 2}) {
		t.Errorf("%+v", s)
	}
	leave := func() {
		for _, c := range inside {
			c.Close()
		}
		inside = nil
	}
	leave()
	for range 3 {
		enter("127.0.0.1:1", true)
		enter("", true)
	}
	enter("[::1]:1", false)
	leave()
	enter("[2001:db8::1]:1", true)
	enter("[2001:db8::2]:1", true)
	enter("[2001:db8::3]:1", true)
	enter("[2001:db8::4]:1", false) // one network
	enter("[2001:db8:0:1::4]:1", true)
}

// scarce is a listener to which connections come, and failures in between.
type scarce struct {
	net.Listener
	coming []any
}

func (l *scarce) Addr() net.Addr { return &net.TCPAddr{} }

func (l *scarce) Accept() (net.Conn, error) {
	if len(l.coming) == 0 {
		return nil, net.ErrClosed
	}
	next := l.coming[0]
	l.coming = l.coming[1:]
	if err, ok := next.(error); ok {
		return nil, err
	}
	return next.(net.Conn), nil
}

// TestNoFiles has a process be out of files: an idle connection makes room, and while there is none
// it is tried again, and said once.
func TestNoFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
		first, second, third := &client{address: "192.0.2.1:1"}, &client{address: "192.0.2.2:1"}, &client{address: "192.0.2.3:1"}
		var said []error
		g := admission.New(6, &scarce{coming: []any{first, full, full, second, full, third}}, new(admission.Counts), func(err error) { said = append(said, err) })
		accept := func(want net.Conn) *admission.Conn {
			t.Helper()
			c, err := g.Accept()
			if err != nil || c.(*admission.Conn).Conn != want {
				t.Fatalf("%v, %v", c, err)
			}
			return c.(*admission.Conn)
		}
		accept(first)
		accept(second).SetIdle(true)
		accept(third)
		if first.closed || !second.closed || third.closed {
			t.Errorf("closed: %v, %v, %v", first.closed, second.closed, third.closed)
		}
		if len(said) != 1 || !errors.Is(said[0], syscall.EMFILE) {
			t.Errorf("said %v", said)
		}
		if _, err := g.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("at the end: %v", err)
		}
	})
}

// TestIdle lets new connections in where others are idle: the one that has been so the longest
// goes.
func TestIdle(t *testing.T) {
	g := admission.New(4, nil, new(admission.Counts), nil)
	clients := map[string]*client{}
	inside := map[string]*admission.Conn{}
	enter := func(address string, want bool) {
		t.Helper()
		c := &client{address: address}
		conn, ok := g.Enter(c)
		if ok != want || c.closed == want {
			t.Errorf("%q: let in %v, closed %v", address, ok, c.closed)
		}
		clients[address], inside[address] = c, conn
	}
	for _, address := range []string{"192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1", "192.0.2.3:1"} {
		enter(address, true)
	}
	enter("192.0.2.4:1", false) // all are busy
	inside["192.0.2.2:1"].SetIdle(true)
	inside["192.0.2.1:2"].SetIdle(true)
	inside["192.0.2.3:1"].SetIdle(true)
	inside["192.0.2.2:1"].SetIdle(true) // for no less long than before
	enter("192.0.2.1:3", true)          // a host that has half makes room itself
	if !clients["192.0.2.1:2"].closed || clients["192.0.2.2:1"].closed || clients["192.0.2.3:1"].closed {
		t.Error("another host made room")
	}
	enter("192.0.2.1:4", false)
	inside["192.0.2.2:1"].SetIdle(false)
	enter("192.0.2.5:1", true)
	if clients["192.0.2.2:1"].closed || !clients["192.0.2.3:1"].closed {
		t.Error("a busy connection made room, or none")
	}
	if s := g.Stats(); s != (admission.Stats{Connections: 4, Accepted: 6, TurnedAway: 2}) {
		t.Errorf("%+v", s)
	}
	// Those that made room leave, too, and do not count twice.
	inside["192.0.2.3:1"].SetIdle(true)
	for _, c := range inside {
		if c != nil {
			c.Close()
		}
	}
	g.Wait()
	if s := g.Stats(); s.Connections != 0 {
		t.Errorf("%+v", s)
	}
}

// TestBurst has more clients come at once than there is room for: each gets its answer, as it would
// if they came one after the other.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, l, g := listen(4)
		defer serve(t, g, http.NotFoundHandler())()
		var clients sync.WaitGroup
		for range 40 {
			clients.Go(func() {
				c, err := network.Dial(t.Context(), "tcp", l.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				time.Sleep(time.Millisecond) // so that all are there before any has asked
				io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
				if answer, err := io.ReadAll(c); err != nil || !strings.Contains(string(answer), " 404 ") {
					t.Errorf("answer %q, %v", answer, err)
				}
			})
		}
		clients.Wait()
	})
}

// listen returns a gate for so many connections, with the listener and the network that it is in.
func listen(most int) (*sourcetest.Network, net.Listener, *admission.Gate) {
	network := new(sourcetest.Network)
	l := network.Listen()
	return network, l, admission.New(most, l, new(admission.Counts), nil)
}

// serve serves the connections of a gate until the function that it returns is called.
func serve(t *testing.T, g *admission.Gate, handler http.Handler) (end func()) {
	ctx, stop := context.WithCancel(t.Context())
	server := g.Server(handler)
	server.Protocols = new(http.Protocols)
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	var group sync.WaitGroup
	group.Go(func() {
		if err := g.Serve(ctx, server); err != nil {
			t.Error(err)
		}
	})
	return func() {
		stop()
		group.Wait()
	}
}

// TestFlood has one host come again and again, which never asks for anything: it does not keep
// another one waiting, which comes behind.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var coming []any
		for range 2000 {
			coming = append(coming, &client{address: "192.0.2.1:1"})
		}
		other := &client{address: "192.0.2.2:1"}
		g := admission.New(4, &scarce{coming: append(coming, other)}, new(admission.Counts), nil)
		began := time.Now()
		for {
			c, err := g.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if c.(*admission.Conn).Conn == other {
				break
			}
			c.(*admission.Conn).SetIdle(true)
		}
		if waited := time.Since(began); waited > 5*time.Second {
			t.Errorf("accepted after %v", waited)
		}
		if s := g.Stats(); s.Accepted != 2001 || s.Connections != 3 {
			t.Errorf("%+v", s)
		}
	})
}

// TestFloodOfTwo has two hosts, which may have all room, come again and again: a connection of
// another one stays, although it has been idle for longer than theirs.
func TestFloodOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := admission.New(4, nil, new(admission.Counts), nil)
		enter := func(address string) *client {
			c := &client{address: address}
			conn, ok := g.Enter(c)
			if !ok {
				t.Fatalf("%s was turned away", address)
			}
			conn.SetIdle(true)
			time.Sleep(time.Millisecond)
			return c
		}
		other := enter("192.0.2.1:1")
		for range 1000 {
			enter("192.0.2.2:1")
			enter("192.0.2.3:1")
		}
		if other.closed {
			t.Error("it made room for hosts that have more")
		}
	})
}

// TestBody has a client send the body of its request without end: it makes room, whether the body
// is waited for or refused.
func TestBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, l, g := listen(1)
		defer serve(t, g, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "PUT" {
				io.Copy(w, r.Body)
			}
		}))()
		ask := func(request string) net.Conn {
			synctest.Wait() // for those to have left that are closed
			c, err := network.Dial(t.Context(), "tcp", l.Addr().String())
			testhelp.Must(t, err)
			go io.WriteString(c, request)
			time.Sleep(time.Second)
			return c
		}
		for _, head := range []string{"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n", "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"} {
			slow := ask(head + "slow")
			c := ask("PUT / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\nwhole")
			if answer, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(answer), "\r\n\r\nwhole") {
				t.Errorf("answer %q, %v", answer, err)
			}
			c.Close()
			slow.Close()
		}
		// Who asks first whether a body is wanted is told at once that it is not.
		began := time.Now()
		c := ask("POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5000\r\n\r\n")
		if n, err := c.Read(make([]byte, 1)); n == 0 || time.Since(began) > 5*time.Second {
			t.Errorf("an answer of %d bytes, %v, after %v", n, err, time.Since(began))
		}
		c.Close()
	})
}

// TestBodyOfMany has a client send the body of a request by HTTP/2 without end: the connection
// makes room, but not while another request is answered there.
func TestBodyOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, l, g := listen(1)
		answer := make(chan struct{})
		defer serve(t, g, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "PUT" {
				if _, err := io.Copy(io.Discard, r.Body); err != nil {
					return
				}
			}
			<-answer
			io.WriteString(w, "answer")
		}))()
		transport := &http.Transport{DialContext: network.Dial, Protocols: new(http.Protocols)}
		transport.Protocols.SetUnencryptedHTTP2(true)
		defer transport.CloseIdleConnections()
		var group sync.WaitGroup
		defer group.Wait()
		ask := func(method string, body io.Reader) (cancel func()) {
			ctx, cancel := context.WithCancel(t.Context())
			request, err := http.NewRequestWithContext(ctx, method, "http://"+l.Addr().String(), body)
			testhelp.Must(t, err)
			group.Go(func() {
				if response, err := transport.RoundTrip(request); err == nil {
					response.Body.Close()
				}
			})
			time.Sleep(time.Second)
			return cancel
		}
		enters := func(want bool) {
			t.Helper()
			c, ok := g.Enter(&client{address: "192.0.2.9:1"})
			if ok != want {
				t.Errorf("another one is let in: %v", ok)
			}
			if ok {
				c.Close()
				synctest.Wait() // or the next request may go where there is no way any more
			}
		}
		slow, end := io.Pipe()
		defer end.Close()
		defer ask("PUT", slow)()
		defer ask("PUT", nil)()
		enters(false)
		answer <- struct{}{}
		time.Sleep(5 * time.Second)
		enters(true)
		// Nor does it count what was given up.
		for range 2 {
			ask("PUT", nil)()
		}
		synctest.Wait() // until the server knows
		for range 2 {
			answer <- struct{}{}
		}
		time.Sleep(time.Second)
		enters(true)
		// A body of which nobody knows that it is empty is not waited for by who does not read it.
		defer ask("GET", io.MultiReader())()
		enters(false)
		answer <- struct{}{}
		time.Sleep(5 * time.Second)
		enters(true)
	})
}

// TestFlow has clients send the body of a request, or read an answer, slowly: their connections do
// not make room before nothing flows any more.
func TestFlow(t *testing.T) {
	for _, second := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			network, l, g := listen(1)
			defer serve(t, g, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, err := io.Copy(io.Discard, r.Body)
				for err == nil {
					_, err = w.Write(make([]byte, 32<<10))
				}
			}))()
			transport := &http.Transport{DialContext: network.Dial, Protocols: new(http.Protocols)}
			transport.Protocols.SetHTTP1(!second)
			transport.Protocols.SetUnencryptedHTTP2(second)
			defer transport.CloseIdleConnections()
			enters := func(want bool) {
				t.Helper()
				c, ok := g.Enter(&client{address: "192.0.2.9:1"})
				if ok != want {
					t.Errorf("HTTP/2 %v: another one is let in: %v", second, ok)
				}
				if ok {
					c.Close()
				}
			}
			body, more := io.Pipe()
			for _, sent := range []io.Reader{body, nil} {
				request, err := http.NewRequestWithContext(t.Context(), "PUT", "http://"+l.Addr().String(), sent)
				testhelp.Must(t, err)
				answered := make(chan *http.Response, 1)
				go func() {
					response, _ := transport.RoundTrip(request)
					answered <- response
				}()
				for i := 0; sent != nil && i < 10; i++ {
					more.Write(make([]byte, 5<<10))
					time.Sleep(time.Second)
					enters(false)
				}
				if sent == nil {
					response := <-answered
					for range 10 {
						// More than is sent without the client's leave, once all of that has come.
						io.CopyN(io.Discard, response.Body, 5<<20)
						time.Sleep(time.Second)
						enters(false)
					}
					defer response.Body.Close()
				}
				time.Sleep(5 * time.Second)
				enters(true)
				synctest.Wait()
			}
			more.Close()
		})
	}
}

// TestLeave checks that a connection by TLS makes room at once, though its client does not read.
func TestLeave(t *testing.T) {
	config := &tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{testhelp.Certificate()}}
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		g := admission.New(1, nil, new(admission.Counts), nil)
		server := tls.Server(near, config)
		first, _ := g.Enter(server)
		go tls.Client(far, &tls.Config{InsecureSkipVerify: true}).Handshake()
		testhelp.Must(t, server.Handshake())
		first.SetIdle(true)
		began := time.Now()
		second, ok := g.Enter(&client{address: "192.0.2.9:1"})
		if took := time.Since(began); !ok || took > time.Second {
			t.Errorf("let in: %v, after %v", ok, took)
		}
		first.Close()
		second.Close()
	})
}

// TestServe checks that who comes where there is no room is closed without having been served, that
// idle connections make room, and that what has been requested at the end is answered, unless that
// takes long.
func TestServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network, l, g := listen(1)
		answer := make(chan struct{})
		server := g.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-answer:
			case <-r.Context().Done():
			}
		}))
		ctx, stop := context.WithCancel(t.Context())
		served := make(chan error)
		go func() { served <- g.Serve(ctx, server) }()
		ask := func() net.Conn {
			c, err := network.Dial(t.Context(), "tcp", l.Addr().String())
			testhelp.Must(t, err)
			go io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			synctest.Wait()
			return c
		}
		read := func(c net.Conn, want string) {
			t.Helper()
			b := make([]byte, 1000)
			if n, _ := c.Read(b); !strings.HasPrefix(string(b[:n]), want) || want == "" && n > 0 {
				t.Errorf("answer is %q", b[:n])
			}
		}
		first := ask()
		read(ask(), "") // there is no room
		answer <- struct{}{}
		read(first, "HTTP/1.1 200 ")
		synctest.Wait()
		second := ask()
		read(first, "") // was idle, and has made room
		synctest.Wait()
		begin := time.Now()
		stop()
		time.Sleep(time.Second)
		answer <- struct{}{}
		read(second, "HTTP/1.1 200 ")
		if err := <-served; err != nil || time.Since(begin) > 2*time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if s := g.Stats(); s != (admission.Stats{Accepted: 2, TurnedAway: 1}) {
			t.Errorf("%+v", s)
		}

		l = network.Listen()
		g = admission.New(1, l, new(admission.Counts), nil)
		ctx, stop = context.WithCancel(t.Context())
		go func() { served <- g.Serve(ctx, g.Server(server.Handler)) }()
		third := ask()
		begin = time.Now()
		stop()
		if err := <-served; err != nil || time.Since(begin) < 5*time.Second || time.Since(begin) > 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		read(third, "")
	})
}

// at is a listener that only has an address.
type at struct {
	net.Listener
	address string
}

func (l at) Addr() net.Addr { return (&client{address: l.address}).RemoteAddr() }

// TestLoopback checks that this machine is one host, unless the listener is for it alone.
func TestLoopback(t *testing.T) {
	for _, c := range []struct {
		listens string
		from    []string
		want    int
	}{
		{"192.0.2.1:1", []string{"127.0.0.1:1", "[::1]:2", "127.0.0.2:3"}, 2},
		{"[::]:1", []string{"127.0.0.1:1", "[::1]:2", "[::ffff:127.0.0.1]:3"}, 2},
		{"127.0.0.1:1", []string{"127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"}, 3},
		{"[::1]:1", []string{"[::1]:1", "[::1]:2", "[::1]:3"}, 3},
		{"", []string{"", "", ""}, 3},
	} {
		g := admission.New(4, at{address: c.listens}, new(admission.Counts), nil)
		entered := 0
		for _, address := range c.from {
			if _, ok := g.Enter(&client{address: address}); ok {
				entered++
			}
		}
		if entered != c.want {
			t.Errorf("%q: %d of %q let in, want %d", c.listens, entered, c.from, c.want)
		}
	}
}

// TestLog checks that it is told once a minute at most that connections are turned away.
func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged []string
		g := admission.New(2, nil, new(admission.Counts), func(err error) { logged = append(logged, err.Error()) })
		for _, address := range []string{"192.0.2.1:1", "192.0.2.1:2", "192.0.2.1:3", "192.0.2.2:1", "192.0.2.3:1"} {
			g.Enter(&client{address: address})
		}
		time.Sleep(time.Minute)
		g.Enter(&client{address: "192.0.2.4:1"})
		if len(logged) != 2 || !strings.HasPrefix(logged[0], "1 connections turned away: all of 2,") || !strings.HasPrefix(logged[1], "3 connections turned away") {
			t.Errorf("logged: %q", logged)
		}
	})
}

// TestSlots checks that those who wait get slots when others give them back, and that no host gets
// all.
func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := admission.NewSlots(4)
		var mu sync.Mutex
		var held []func()
		waiting := 0
		expect := func(holding, wait int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if len(held) != holding || waiting != wait {
				t.Errorf("%d have had a slot, %d wait, want %d and %d", len(held), waiting, holding, wait)
			}
		}
		for i, c := range []struct {
			remote        string
			holding, wait int
		}{
			{"192.0.2.1:1", 1, 0},
			{"192.0.2.1:2", 2, 0},
			{"192.0.2.1:3", 2, 1}, // has half
			{"192.0.2.2:1", 3, 1},
			{"127.0.0.1:1", 4, 1},
			{"127.0.0.1:2", 4, 2},
		} {
			mu.Lock()
			waiting++
			mu.Unlock()
			go func() {
				release, err := s.Acquire(t.Context(), c.remote)
				mu.Lock()
				defer mu.Unlock()
				waiting--
				if err != nil {
					t.Errorf("%d: %v", i, err)
				}
				held = append(held, release)
			}()
			expect(c.holding, c.wait)
		}
		held[2]() // that of another host
		expect(5, 1)
		held[0]()
		expect(6, 0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Acquire(ctx, "192.0.2.3:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		for _, release := range []int{1, 3, 4, 5} {
			held[release]()
		}
	})
}

// TestSeldom logs once in a while, also after the clock was set back: that of a bubble is that of
// the year 2000.
func TestSeldom(t *testing.T) {
	logged := 0
	log := func(error) { logged++ }
	seldom := admission.Seldom{Every: time.Minute}
	seldom.Log(log, errors.New("once"))
	seldom.Log(log, errors.New("too soon"))
	synctest.Test(t, func(t *testing.T) {
		for range 3 {
			seldom.Log(log, errors.New("at once, and a minute later"))
			time.Sleep(30 * time.Second)
		}
	})
	if logged != 3 {
		t.Errorf("logged %d times", logged)
	}
}
