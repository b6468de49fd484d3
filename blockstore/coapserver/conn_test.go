// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"bufio"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap/coaptest"
)

// TestConnected asks a client for more than it may be asked for at a time.
func TestConnected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := coapserver.New(coapserver.Config{})
		var conn *coap.Conn
		ended := false
		connected := func(c *coap.Conn, client string) func() {
			conn = c
			return func() { ended = true }
		}
		near, far := net.Pipe()
		var group sync.WaitGroup
		group.Go(func() { server.ServeConn(near, coapserver.Access{Get: true, Connected: connected}) })
		var gets atomic.Int32
		group.Go(func() {
			for r := bufio.NewReader(far); ; {
				m, err := coaptest.Read(r)
				if err != nil {
					return
				}
				if m.Code == codes.GET {
					gets.Add(1)
				}
			}
		})
		far.Write(coaptest.CSM)
		synctest.Wait()
		store := coap.NewRequests([]string{".well-known", "eris"})
		for range 100 {
			group.Add(1)
			conn.Start(&coap.Exchange{Store: store, Size: eris.BlockSize1KiB, Done: func(x *coap.Exchange) {
				if x.Err == nil {
					t.Error("an answer")
				}
				group.Done()
			}})
		}
		synctest.Wait()
		if n := gets.Load(); n != 64 {
			t.Errorf("%d requests were made at a time", n)
		}
		conn.Close(errors.New("the test is over"))
		far.Close()
		group.Wait()
		if !ended {
			t.Error("nobody is told of the end")
		}
		server.Close()
	})
}

// TestSilentHandshake checks that a client that does not speak TLS where it should does not keep
// its connection, which makes room before that.
func TestSilentHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := coapserver.New(coapserver.Config{})
		near, far := net.Pipe()
		defer time.AfterFunc(time.Hour, func() { far.Close() }).Stop()
		begin := time.Now()
		server.ServeConn(tls.Server(near, &tls.Config{}), coapserver.Access{Get: true})
		if took := time.Since(begin); took > time.Minute {
			t.Errorf("the connection was kept for %v", took)
		}
		server.Close()

		var network sourcetest.Network
		l := network.Listen()
		server = coapserver.New(coapserver.Config{MaxConnections: 1})
		var group sync.WaitGroup
		group.Go(func() { server.Serve(tls.NewListener(l, &tls.Config{}), coapserver.Access{Get: true}) })
		for range 3 {
			c, err := network.Dial(t.Context(), "tcp", l.Addr().String())
			must(t, err)
			defer c.Close()
			time.Sleep(time.Second)
		}
		if s := server.Stats(); s.TurnedAway > 0 {
			t.Errorf("%d connections were turned away", s.TurnedAway)
		}
		server.Close()
		group.Wait()
	})
}
