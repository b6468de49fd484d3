// SPDX-License-Identifier: GPL-3.0-or-later

package main

import "testing"

func TestParseEndpoint(t *testing.T) {
	for _, v := range []struct{ url, want string }{
		{"coap+tcp://127.0.0.1:5683", "coap+tcp://127.0.0.1:5683 (get)"},
		{"coap+tcp://[::]:0?get&put", "coap+tcp://[::]:0 (get, put)"},
		{"coap+tcp://[::1]", "coap+tcp://[::1]:5683 (get)"},
		{"coap+tcp://:5683", "coap+tcp://:5683 (get)"},
		{"coap+tcp://localhost/.well-known/eris", "coap+tcp://localhost:5683 (get)"},
		{"coap://[fe80::1%25eth0]:7/?get", "coap://[fe80::1%25eth0]:7 (get)"},
		{"coap://host?put", "coap://host:5683 (put)"},
		{"COAP://host?put", "coap://host:5683 (put)"},
		{"coap+ws://host", "coap+ws://host:80 (get)"},
		{"coap+ws://host:8080/?put", "coap+ws://host:8080 (put)"},
		{"coap+ws://host/.well-known/coap", ""},
		{"coaps+ws://host", ""},
		{"coap+ws://host", "coap+ws://host:80 (get)"},
		{"http://host", "http://host:80 (get)"},
		{"http://host:8080/?get&put", "http://host:8080 (get, put)"},
		{"coap+unix:///run/a", "coap+unix:///run/a (get, put)"},
		{"coap+unix:///run/a%20b?get", "coap+unix:///run/a%20b (get)"},
		{"", ""},
		{"host:5683", ""},
		{"https://host", ""},
		{"coaps+tcp://host", ""},
		{"coap+tcp://host:5683?", ""},
		{"coap+tcp://host:5683?get&post", ""},
		{"coap+tcp://host:5683?get=1", ""},
		{"coap+tcp://host:65536", ""},
		{"coap+tcp://host:x", ""},
		{"coap+tcp://user@host", ""},
		{"coap+tcp://host/other", ""},
		{"coap+tcp://host#x", ""},
		{"coap+tcp:host", ""},
		{"http://host/uri-res/N2R", ""},
		{"coap+unix://host/run/a", ""},
		{"coap+unix://", ""},
		{"coap+unix:///", ""},
	} {
		got := ""
		e, err := parseEndpoint(v.url)
		if err == nil {
			got = e.String()
		}
		if got != v.want {
			t.Errorf("%s: %q, want %q; %v", v.url, got, v.want, err)
		}
	}
}

func TestDefaultSocket(t *testing.T) {
	for _, v := range []struct {
		user      int
		directory string
		want      string
	}{
		{0, "/run/user/0", "/run/guix-substitute-eris/eris.sock"},
		{1000, "/run/user/1000", "/run/user/1000/eris.sock"},
		{1000, "", ""},
		{1000, "run", ""},
	} {
		got, err := defaultSocket(v.user, v.directory)
		if got != v.want || (err != nil) != (v.want == "") {
			t.Errorf("user %d, %q: %q, %v; want %q", v.user, v.directory, got, err, v.want)
		}
	}
}
