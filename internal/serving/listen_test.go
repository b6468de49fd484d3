// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import "testing"

// TestParseEndpoint checks what becomes of URLs, about which package storeurl has more tests.
func TestParseEndpoint(t *testing.T) {
	for _, v := range []struct{ url, want string }{
		{"coap+tcp://127.0.0.1:5683", "coap+tcp://127.0.0.1:5683 (get)"},
		{"coap+tcp://[::]:0?get&put", "coap+tcp://[::]:0 (get, put)"},
		{"coap+tcp://:5683", "coap+tcp://:5683 (get)"},
		{"coap://[fe80::1%25eth0]:7/?get", "coap://[fe80::1%25eth0]:7 (get)"},
		{"COAP://host?put", "coap://host:5683 (put)"},
		{"coap+ws://host", "coap+ws://host:80 (get)"},
		{"http://host:8080/?get&put", "http://host:8080 (get, put)"},
		{"coap+unix:///run/a%20b?get", "coap+unix:///run/a%20b (get)"},
		{"coap+unix:///run/a", "coap+unix:///run/a (get, put)"},
	} {
		e, err := parseEndpoint(v.url)
		if got := e.String(); err != nil || got != v.want {
			t.Errorf("%s: %q, want %q; %v", v.url, got, v.want, err)
		}
	}
	if e, err := parseEndpoint("https://host"); err == nil {
		t.Errorf("%v is something to listen on", e)
	}
}
