// SPDX-License-Identifier: GPL-3.0-or-later

package ipfs

import (
	"bytes"
	"context"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/httpclient"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestCID has the one pair of reference and name that is known from elsewhere: the block of "Hello
// world!".
func TestCID(t *testing.T) {
	b, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString("H77AGSYKAVTQPUHODJTQA7WZPTWGTTKLRB2GLMF5H53NEKFJ3FUQ")
	testhelp.Must(t, err)
	const want = "bafk2bzacea774a2lbicwob6q5yngoad63f6oy2onjoehiznqxu7xnurivhmws"
	if got := CID(eris.Reference(b)); got != want {
		t.Errorf("CID is %s, want %s", got, want)
	}
	for _, fill := range []byte{0, 0xff} {
		if got := CID(eris.Reference(bytes.Repeat([]byte{fill}, 32))); len(got) != 62 || !strings.HasPrefix(got, "bafk2bzace") {
			t.Errorf("CID of %x… is %s", fill, got)
		}
	}
}

// parseCID is the way back, on other code than CID, and as strict as can be.
func parseCID(text string) (ref eris.Reference, ok bool) {
	rest, found := strings.CutPrefix(text, "b")
	b, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(strings.ToUpper(rest))
	if !found || text != strings.ToLower(text) || err != nil || len(b) != 38 || !bytes.Equal(b[:6], []byte{1, 0x55, 0xa0, 0xe4, 2, 32}) {
		return ref, false
	}
	return eris.Reference(b[6:]), true
}

const secretPath = "hidden-away"

// testNode is an IPFS node as far as we need one: a gateway and an RPC that refuse whatever the
// real ones might.
type testNode struct {
	blocks  *sourcetest.Backend
	address string
	server  atomic.Pointer[httptest.Server]
}

func (n *testNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, ok := strings.CutPrefix(r.URL.Path, "/"+secretPath)
	if !ok {
		http.Error(w, "no such service", http.StatusNotFound)
		return
	}
	if cid, ok := strings.CutPrefix(path, "/ipfs/"); ok {
		n.gateway(w, r, cid)
		return
	}
	if r.Method != http.MethodPost {
		http.Error(w, "405 - Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	switch path {
	case "/api/v0/block/get":
		n.blockGet(w, r)
	case "/api/v0/block/put":
		n.blockPut(w, r)
	default:
		http.NotFound(w, r)
	}
}

func (n *testNode) gateway(w http.ResponseWriter, r *http.Request, cid string) {
	ref, ok := parseCID(cid)
	if r.Method != http.MethodGet || !ok || r.URL.RawQuery != "format=raw" || r.Header.Get("Accept") != "application/vnd.ipld.raw" {
		http.Error(w, "only raw blocks are served", http.StatusMethodNotAllowed)
		return
	}
	block, err := n.blocks.Get(r.Context(), ref, 0, nil)
	switch {
	case errors.Is(err, eris.ErrNotFound):
		http.Error(w, "ipld: could not find "+cid, http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		w.Write(block)
	}
}

// rpcError is what the RPC of Kubo says when something fails.
func rpcError(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{"Message": message, "Code": 0, "Type": "error"})
}

func (n *testNode) blockGet(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	ref, ok := parseCID(query.Get("arg"))
	timeout, err := time.ParseDuration(query.Get("timeout"))
	if !ok || err != nil || len(query) != 2 {
		rpcError(w, http.StatusBadRequest, "invalid request "+r.URL.RawQuery)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	block, err := n.blocks.Get(ctx, ref, 0, nil)
	switch {
	case errors.Is(err, eris.ErrNotFound):
		rpcError(w, http.StatusInternalServerError, "block was not found locally (offline): ipld: could not find "+query.Get("arg"))
	case err != nil:
		rpcError(w, http.StatusInternalServerError, err.Error())
	default:
		// Kubo does not say how long it is.
		w.Write(block[:len(block)/2])
		w.(http.Flusher).Flush()
		w.Write(block[len(block)/2:])
	}
}

func (n *testNode) blockPut(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	if query.Get("cid-codec") != "raw" || query.Get("mhtype") != "blake2b-256" ||
		query.Get("mhlen") != "32" || query.Get("pin") != "true" || len(query) != 4 {
		rpcError(w, http.StatusBadRequest, "invalid request "+r.URL.RawQuery)
		return
	}
	block, err := onlyFile(r)
	ref := eris.Sum(block)
	if err == nil {
		err = n.blocks.Put(r.Context(), ref, block)
	}
	if err != nil {
		rpcError(w, http.StatusInternalServerError, err.Error())
		return
	}
	const prefix = "\x01\x55\xa0\xe4\x02\x20"
	name := strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(append([]byte(prefix), ref[:]...)))
	json.NewEncoder(w).Encode(map[string]any{"Key": "b" + name, "Size": len(block)})
}

// onlyFile returns the one file of a form.
func onlyFile(r *http.Request) ([]byte, error) {
	if err := r.ParseMultipartForm(1 << 20); err != nil {
		return nil, err
	}
	headers := r.MultipartForm.File["file"]
	if len(headers) != 1 || len(r.MultipartForm.File)+len(r.MultipartForm.Value) != 1 || headers[0].Filename == "" {
		return nil, errors.New("one file at a time")
	}
	file, err := headers[0].Open()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(file)
}

func startNode(tb testing.TB, blocks *sourcetest.Backend) *testNode {
	n := &testNode{blocks: blocks, address: testhelp.FreeAddress()}
	n.start()
	tb.Cleanup(func() { n.stop() })
	return n
}

func (n *testNode) breakConnections() { n.server.Load().CloseClientConnections() }

// stop ends the server, whatever it is doing.
func (n *testNode) stop() {
	server := n.server.Load()
	server.Config.Close()
	server.Close()
}

func (n *testNode) restart() {
	n.stop()
	n.start()
}

func (n *testNode) start() {
	listener, err := net.Listen("tcp", n.address)
	if err != nil {
		panic(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: n}}
	server.Start()
	n.server.Store(server)
}

func (n *testNode) url(query string) string {
	return "ipfs+http://" + n.address + "/" + secretPath + query
}

func mustOpen(tb testing.TB, url string, options Options) *Store {
	tb.Helper()
	s, err := Open(url, options)
	testhelp.Must(tb, err)
	return s
}

func TestConformance(t *testing.T) {
	for _, kind := range []string{"gateway", "rpc"} {
		t.Run(kind, func(t *testing.T) {
			sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
				n := startNode(t, backend)
				store := mustOpen(t, n.url("?"+kind), Options{Timeout: 5 * time.Minute})
				fixture := sourcetest.Fixture{
					Source:   store,
					ReadOnly: mustOpen(t, n.url("?gateway"), Options{}),
					Restart:  n.restart,
					Break:    n.breakConnections,
					Secret:   secretPath,
					Held:     4,
				}
				if kind == "gateway" {
					// Its Put is that of ReadOnly.
					fixture.Source = sourceOnly{store}
				}
				return fixture
			})
		})
	}
}

// sourceOnly hides that a gateway is a Store.
type sourceOnly struct{ fetch.Source }

func TestURL(t *testing.T) {
	for _, v := range []struct {
		url  string
		ask  string // method and URL of a GET, or an error
		text string
	}{
		{"ipfs+http://127.0.0.1:8080", "GET http://127.0.0.1:8080/ipfs/CID?format=raw", "ipfs+http://127.0.0.1:8080"},
		{"ipfs+http://127.0.0.1:5001", "POST http://127.0.0.1:5001/api/v0/block/get?arg=CID&timeout=20s", "ipfs+http://127.0.0.1:5001"},
		{"ipfs+http://127.0.0.1:5001/", "POST http://127.0.0.1:5001/api/v0/block/get?arg=CID&timeout=20s", "ipfs+http://127.0.0.1:5001"},
		{"ipfs+http://127.0.0.1:5001?gateway", "GET http://127.0.0.1:5001/ipfs/CID?format=raw", "ipfs+http://127.0.0.1:5001"},
		{"ipfs+https://node.example/api/v0", "POST https://node.example/api/v0/block/get?arg=CID&timeout=20s", "ipfs+https://node.example"},
		{"ipfs+https://node.example/a%2Fb/api/v0/", "POST https://node.example/a%2Fb/api/v0/block/get?arg=CID&timeout=20s", "ipfs+https://node.example"},
		{"ipfs+https://node.example/a?rpc&get", "POST https://node.example/a/api/v0/block/get?arg=CID&timeout=20s", "ipfs+https://node.example"},
		{"ipfs+https://user:secret@[::1]/a/?gateway", "GET https://[::1]/a/ipfs/CID?format=raw", "ipfs+https://[::1]"},
		{"ipfs+http://h?put", "", "ipfs+http://h"},
		{"http://secret", "scheme", ""},
		{"ipfs+http://h/secret?gateway&rpc", "either", ""},
		{"ipfs+http://h/api/v0?gateway", "either", ""},
	} {
		s, err := Open(v.url, Options{})
		if err != nil {
			if v.text != "" || !strings.Contains(err.Error(), v.ask) || strings.Contains(err.Error(), "h/secret") {
				t.Errorf("%.60s: %v", v.url, err)
			}
			continue
		}
		if got := s.String(); got != v.text {
			t.Errorf("%.60s: String is %q, want %q", v.url, got, v.text)
		}
		request := s.getRequest(eris.Reference{})
		got := request.Method + " " + strings.Replace(request.URL.String(), CID(eris.Reference{}), "CID", 1)
		if v.ask != "" && got != v.ask {
			t.Errorf("%s: asks %s, want %s", v.url, got, v.ask)
		}
		if user, password, ok := request.BasicAuth(); ok != strings.Contains(v.url, "@") || ok && (user != "user" || password != "secret") {
			t.Errorf("%s: user %q, password %q", v.url, user, password)
		}
		if v.ask == "" {
			if _, err := fetch.Get(t.Context(), s, eris.Reference{}, eris.BlockSize1KiB, nil); !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("%s: Get: %v", v.url, err)
			}
		}
		s.Close()
	}
}

// TestLocalhost checks that a gateway under this name is asked by its address, so that it does not
// send us elsewhere.
func TestLocalhost(t *testing.T) {
	for url, want := range map[string]string{
		"ipfs+http://localhost:8080":      "127.0.0.1:8080",
		"ipfs+http://localhost":           "127.0.0.1",
		"ipfs+http://localhost:8080/?rpc": "localhost:8080",
	} {
		s := mustOpen(t, url, Options{})
		if r := s.getRequest(eris.Reference{}); r.Host != want || r.URL.Hostname() != "localhost" {
			t.Errorf("%s: host is %q, want %q", url, r.Host, want)
		}
		s.Close()
	}
}

// TestLocalProxy checks that a proxy is not asked for the node of this machine.
func TestLocalProxy(t *testing.T) {
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	t.Setenv("no_proxy", "")
	block := bytes.Repeat([]byte("block"), 205)[:eris.BlockSize1KiB]
	s := serve(t, "", Options{}, func(w http.ResponseWriter, _ *http.Request) { w.Write(block) })
	if _, err := fetch.Get(t.Context(), s, eris.Sum(block), eris.BlockSize1KiB, nil); err != nil {
		t.Error(err)
	}
}

// serve starts a server of one handler, and returns a store for it.
func serve(t *testing.T, query string, options Options, handler http.HandlerFunc) *Store {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	s := mustOpen(t, "ipfs+http://"+server.Listener.Addr().String()+"/"+query, options)
	t.Cleanup(func() { s.Close() })
	return s
}

// raw answers with exactly these bytes and closes the connection.
func raw(format string, args ...any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, format, args...)
	}
}

// status answers with a status and a text.
func status(code int, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, text, code) }
}

// TestHostile has nodes that answer anything but what they should; what bodies may look like is
// tested in package web. Each call must end with an error of the right kind.
func TestHostile(t *testing.T) {
	block := bytes.Repeat([]byte("block"), 205)[:eris.BlockSize1KiB]
	ref := eris.Sum(block)
	const (
		fails = iota
		wrong
		missing
		response
		busy
		readOnly
	)
	hangs := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}
	// endless answers with a status and then one text again and again.
	endless := func(status int, begin, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			for _, err := io.WriteString(w, begin); err == nil; {
				_, err = io.WriteString(w, strings.Repeat(text, 1<<16))
			}
		}
	}
	rpc := func(status int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { rpcError(w, status, text) }
	}
	for _, v := range []struct {
		name    string
		query   string
		handler http.HandlerFunc
		want    int
	}{
		{"wrong bytes", "", func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 1024)) }, wrong},
		{"endless", "", endless(200, "", "\x00"), wrong},
		{"endless RPC", "?rpc", endless(200, "", "\x00"), wrong},
		{"closes", "", raw(""), fails},
		{"looks for ever", "", hangs, missing},
		{"RPC looks for ever", "?rpc", hangs, missing},
		{"404", "", status(404, "ipld: could not find"), missing},
		{"410", "", status(410, "blocked"), missing},
		{"504", "", status(504, "timeout"), missing},
		{"429", "", status(429, "slow down\x1b[2J"), busy},
		{"503, busy for long", "", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "100")
			w.WriteHeader(http.StatusServiceUnavailable)
		}, busy},
		{"302", "", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		}, response},
		{"206", "", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusPartialContent); w.Write(block) }, response},
		{"RPC has no such path", "?rpc", status(404, "404 page not found"), response},
		{"RPC forbids", "?rpc", status(403, "403 - Forbidden"), response},
		{"RPC does not find", "?rpc", rpc(500, "block was not found locally (offline): ipld: could not find bafk"), missing},
		{"RPC did not find in time", "?rpc", rpc(500, "context deadline exceeded"), missing},
		{"RPC fails", "?rpc", rpc(500, "disk on fire"), response},
		{"endless text", "", endless(500, "", "\x00"), response},

		{"put: another name", "?rpc&put", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"Key":"bafkreigh2akiscaildc","Size":1024}`)
		}, fails},
		{"put: not JSON", "?rpc&put", status(200, "ok"), fails},
		{"put: endless JSON", "?rpc&put", endless(200, `{"Key":"`, "b"), fails},
		{"put: looks for ever", "?rpc&put", hangs, fails},
		{"put: closes", "?rpc&put", raw(""), fails},
		{"put: 500", "?rpc&put", status(500, "no space left on device"), response},
		{"put: 403", "?rpc&put", status(403, "403 - Forbidden"), readOnly},
		{"put: 405", "?rpc&put", status(405, "405 - Method Not Allowed"), readOnly},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			try := func(timeout time.Duration) (got int, err error) {
				s := serve(t, v.query, Options{Timeout: timeout}, v.handler)
				if strings.HasSuffix(v.query, "put") {
					err = s.Put(t.Context(), ref, block)
				} else {
					_, err = fetch.Get(t.Context(), s, ref, eris.BlockSize1KiB, nil)
				}
				switch {
				case err == nil:
					t.Fatal("no error")
				case errors.As(err, new(*eris.BlockError)):
					return wrong, err
				case errors.Is(err, eris.ErrNotFound):
					return missing, err
				case errors.Is(err, fetch.ErrReadOnly):
					return readOnly, err
				case errors.As(err, new(*fetch.BusyError)):
					return busy, err
				case errors.As(err, new(*httpclient.StatusError)):
					return response, err
				}
				return fails, err
			}
			timeout := time.Minute
			if strings.Contains(v.name, "for ever") {
				timeout = 3 * time.Second // mostly long enough to send the request first
			}
			got, err := try(timeout)
			for ; got != v.want && timeout < time.Minute; got, err = try(timeout) {
				timeout *= 5
			}
			if got != v.want {
				t.Errorf("outcome is %d, want %d: %v", got, v.want, err)
			}
			if len(err.Error()) > 1000 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' }) {
				t.Errorf("error is not fit for people: %q", err)
			}
		})
	}
}
