// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A farLine is a listener that counts round trips: what clients send, and connections, wait until
// nothing more has come for a time, and pass together then. So what is sent one after the other
// counts as many times as it is, and what is sent at once counts once, however fast the machine is.
type farLine struct {
	net.Listener
	delay time.Duration

	mu      sync.Mutex
	changed sync.Cond
	trips   int
	counted int
	timer   *time.Timer
}

// begin puts the line before a server that has not been started.
func (l *farLine) begin(server *httptest.Server) {
	l.changed.L = &l.mu
	l.timer = time.AfterFunc(time.Hour, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.trips++
		l.changed.Broadcast()
	})
	l.Listener, server.Listener = server.Listener, l
	server.Start()
}

// cross waits for one round trip.
func (l *farLine) cross() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.timer.Reset(l.delay)
	for trip := l.trips; trip == l.trips; {
		l.changed.Wait()
	}
}

// count returns how many there have been since it was called before.
func (l *farLine) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.trips - l.counted
	l.counted = l.trips
	return n
}

func (l *farLine) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &farConn{Conn: conn, cross: sync.OnceFunc(l.cross), line: l}, err
}

type farConn struct {
	net.Conn
	cross func() // when it is connected
	line  *farLine
	left  []byte // that has come
}

func (c *farConn) Read(b []byte) (int, error) {
	c.cross()
	if len(c.left) == 0 {
		c.left = make([]byte, 64<<10)
		n, err := c.Conn.Read(c.left)
		c.left = c.left[:n]
		if err != nil {
			return 0, err
		}
		c.line.cross()
	}
	n := copy(b, c.left)
	c.left = c.left[n:]
	return n, nil
}

// Over a long line, 60 items of 30 KB that are substituted one after the other take some round
// trips and not one each; and so do the questions about them, if the client has asked about all, or
// if they follow from references. A machine that takes longer than the line between what it sends
// at once has it counted as several: then the line is to be longer.
func TestAheadRoundTrips(t *testing.T) {
	for _, test := range []struct {
		delay         time.Duration
		configuration string
		most, least   int
	}{
		{50 * time.Millisecond, "", 20, 0},
		{100 * time.Millisecond, "", 20, 0},
		{300 * time.Millisecond, "", 20, 0},
		{10 * time.Millisecond, "ahead-items = 0\n", 1000, 60}, // which is what is counted
	} {
		t.Run(fmt.Sprintf("%v %s", test.delay, strings.TrimSpace(test.configuration)), func(t *testing.T) {
			t.Parallel()
			for delay := test.delay; ; delay *= 2 {
				questions, substitutions := aheadRoundTrips(t, delay, test.configuration)
				t.Logf("%v: %d and %d round trips", delay, questions, substitutions)
				if questions <= 8 && substitutions <= test.most && substitutions >= test.least {
					break
				}
				if substitutions < test.least || delay >= 3*time.Second {
					t.Errorf("questions took %d round trips, substitutions %d", questions, substitutions)
					break
				}
			}
		})
	}
}

// aheadRoundTrips returns how many round trips the questions about 60 items take, and their
// substitutions.
func aheadRoundTrips(t *testing.T, delay time.Duration, configuration string) (questions, substitutions int) {
	a := newAheadTest(t, 0, configuration)
	a.size, a.items = 30_000, nil
	a.makeItems(40) // and 20 more
	server, line := httptest.NewUnstartedServer(a), &farLine{delay: delay}
	line.begin(server)
	t.Cleanup(server.Close)
	a.setServer(server.URL)
	all := "info"
	for _, item := range a.items {
		all += " " + item.path
	}
	a.query(all + "\n")
	questions = line.count()
	a.substituteAll(a.start("substitute"))
	return questions, line.count()
}

// A server that closes each connection, or refuses what is too much for it, gets few requests at
// the same time.
func TestAheadSmallServers(t *testing.T) {
	for name, most := range map[string]int{"closing": 100, "refusing": 3} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAheadTest(t, 0, "")
			a.items = nil
			a.makeItems(80)
			var busiest, refused atomic.Int32
			var under atomic.Int32
			a.serve(func(w http.ResponseWriter, r *http.Request) {
				if name == "closing" {
					w.Header().Set("Connection", "close")
				}
				if strings.HasPrefix(r.URL.Path, "/nar/") {
					n := under.Add(1)
					for b := busiest.Load(); n > b && !busiest.CompareAndSwap(b, n); b = busiest.Load() {
					}
					time.Sleep(20 * time.Millisecond)
					under.Add(-1) // before the client can see the end of the response
					if n > int32(most) {
						refused.Add(1)
						w.WriteHeader(http.StatusServiceUnavailable)
						return
					}
				}
				a.ServeHTTP(w, r)
			})
			d, order := a.begin()
			for _, item := range order {
				a.substitute(d, item, item.path)
			}
			must(t, d.close())
			t.Logf("%d at the same time, %d refused", busiest.Load(), refused.Load())
			if name == "closing" && busiest.Load() > 9 {
				t.Errorf("%d requests were under way at the same time", busiest.Load())
			}
			if n := int(refused.Load()); n > len(a.items) {
				t.Errorf("%d requests were refused", n)
			}
		})
	}
}

// What fails together makes room for half as many, not for one.
func TestAheadFailingTogether(t *testing.T) {
	a := newAheadTest(t, 0, "")
	const first, then = 8, 4
	var nars atomic.Int32
	refused, served := make(chan struct{}), make(chan struct{})
	a.serve(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/nar/") {
			n, opens := nars.Add(1), served
			if n <= first {
				opens = refused
			}
			if n == first || n == first+then {
				close(opens)
			}
			select {
			case <-opens:
			case <-r.Context().Done():
				t.Errorf("only %d requests are under way at the same time", nars.Load()-first)
			}
			if n <= first {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
		}
		a.ServeHTTP(w, r)
	})
	d, _ := a.begin()
	a.substituteAll(d)
}

// What could not be staged while a server was away is staged when it is back: nothing would come
// otherwise.
func TestAheadOutage(t *testing.T) {
	a := newAheadTest(t, 2, "")
	first := a.order()[0]
	var mu sync.Mutex
	asked := map[string]bool{}
	back := false
	a.serve(func(w http.ResponseWriter, r *http.Request) {
		base := filepath.Base(r.URL.Path)
		if strings.HasPrefix(r.URL.Path, "/nar/") {
			mu.Lock()
			before := back
			back = len(asked) == len(a.items)
			now := back
			asked[base] = true
			mu.Unlock()
			if !now {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			if !before && base == filepath.Base(first.path) {
				w.Write(first.nar)
				return
			}
		}
		a.ServeHTTP(w, r)
	})
	t.Cleanup(func() { a.open(0, true) })
	a.query()
	a.substituteAll(a.start("substitute"))
}
