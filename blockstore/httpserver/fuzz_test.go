// SPDX-License-Identifier: GPL-3.0-or-later

package httpserver

import (
	"bufio"
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// one is a store of one block that takes any.
type one struct {
	block []byte
	put   eris.Reference
}

func (o *one) Start(r *fetch.Request) {
	r.Block, r.Err = o.block, nil
	if r.Pair.Reference != eris.Sum(o.block) || int(r.Size) != len(o.block) {
		r.Err = eris.ErrNotFound
	}
	r.Done(r)
}
func (o *one) Cancel(*fetch.Request) {}
func (o *one) String() string        { return "one block" }
func (o *one) Close() error          { return nil }

func (o *one) Have(question []byte) []byte {
	ref := eris.Sum(o.block)
	return fetch.HaveBits(question, func(prefix []byte) (has, known bool) { return bytes.HasPrefix(ref[:], prefix), true })
}

func (o *one) Put(_ context.Context, ref eris.Reference, block []byte) error {
	if eris.Sum(block) != ref || !eris.BlockSize(len(block)).Valid() {
		panic("not a block")
	}
	o.put = ref
	return nil
}

// FuzzRequest gives whole requests to the handler, as net/http reads them from a connection.
func FuzzRequest(f *testing.F) {
	store := &one{block: bytes.Repeat([]byte("x"), 1024)}
	ref := eris.Sum(store.block)
	f.Add([]byte("GET /uri-res/N2R?" + ref.URN() + " HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add([]byte("HEAD /uri-res/N2R?urn%3ablake2b%3A" + ref.String() + " HTTP/1.1\r\nHost: x\r\nIf-None-Match: \"a\", W/\"b\"\r\n\r\n"))
	f.Add([]byte("PUT /uri-res/N2R HTTP/1.1\r\nHost: x\r\nContent-Length: 1024\r\n\r\n" + string(store.block)))
	f.Add([]byte("PUT /uri-res/N2R HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" + string(store.block) + "\r\n0\r\n\r\n"))
	f.Add([]byte("GET /uri-res/N2R?urn:eris:BIAD77QDJMFAKZYH2DXBUZYAP3MXZ3DJZVFYQ5DFWC6T65WSFCU5S2IT4YZGJ7AC4SYQMP2DM2ANS2ZTCP3DJJIRV733CRAAHOSWIYZM3M HTTP/1.0\r\n\r\n"))
	f.Add([]byte("POST /.well-known/eris/have HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n12345678" + string(ref[:8])))
	f.Add([]byte("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			return
		}
		server := New(Config{Source: store, Sink: store.Put})
		defer server.Close()
		store.put = eris.Reference{}
		w := httptest.NewRecorder()
		server.Handler(Access{Get: true, Put: true}).ServeHTTP(w, r)
		answer := w.Result()
		query, _ := url.PathUnescape(r.URL.RawQuery)
		switch {
		case answer.StatusCode == 200 && r.Method == "PUT":
			if answer.Header.Get("Content-Location") != Path+"?"+store.put.URN() {
				t.Errorf("answer names %q, stored is %v", answer.Header.Get("Content-Location"), store.put)
			}
		case answer.StatusCode == 200 && r.Method == "POST":
			if r.URL.Path != HavePath || w.Body.Len() == 0 || w.Body.Len() > fetch.MaxHave/8 {
				t.Errorf("%q is answered by %x", b, w.Body.Bytes())
			}
		case answer.StatusCode == 200 || answer.StatusCode == 304:
			if !strings.EqualFold(query, ref.URN()) || !strings.HasSuffix(query, ref.String()) || r.URL.Path != Path {
				t.Errorf("%q is answered by %s", r.RequestURI, answer.Status)
			}
			if answer.StatusCode == 200 && r.Method == "GET" && !bytes.Equal(w.Body.Bytes(), store.block) {
				t.Error("the answer is not the block")
			}
		case answer.StatusCode < 400 || answer.StatusCode > 405:
			t.Errorf("%q is answered by %s", b, answer.Status)
		}
		if answer.StatusCode != 200 && store.put != (eris.Reference{}) {
			t.Errorf("a block is stored, and the answer is %s", answer.Status)
		}
	})
}
