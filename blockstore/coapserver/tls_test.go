// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver_test

import (
	"crypto/tls"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
)

// TestSilentHandshake checks that a client that does not speak TLS where it should does not keep
// its connection.
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
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
}
