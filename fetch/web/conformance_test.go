// SPDX-License-Identifier: GPL-3.0-or-later

package web_test

import (
	"io"
	"log"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

var quiet = log.New(io.Discard, "", 0)

const secretPath = "/hidden-away"

func TestConformance(t *testing.T) {
	for _, test := range []struct {
		name, path string
		protocols  []string
	}{
		{"HTTP1", "", []string{"http/1.1"}},
		{"HTTP2", "", []string{"http/1.1", "h2"}},
		{"TLS", "", []string{"http/1.1", "tls"}},
		{"Cleartext", "?h2c", []string{"h2c"}},
		{"Flat", "/flat/?static", []string{"http/1.1"}},
		{"Sharded", "/sharded?static&layout=sharded", []string{"http/1.1", "h2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				server := startServer(t, serve(secretPath, backend, true), test.protocols...)
				readOnly := startServer(t, serve("", backend, false), test.protocols...)
				return sourcetest.Fixture{
					Source:   mustOpen(t, server.url(secretPath+test.path), web.Options{}),
					ReadOnly: mustOpen(t, readOnly.url(test.path), web.Options{}),
					Restart:  server.restart,
					Break:    server.breakConnections,
					Secret:   secretPath,
					Held:     20,
				}
			})
		})
	}
}
