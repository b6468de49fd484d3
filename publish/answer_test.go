// SPDX-License-Identifier: GPL-3.0-or-later

package publish_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// request sends a request with the given fields, NAME: VALUE, and returns the answer as it came.
func request(t *testing.T, method, url string, fields ...string) (status int, header http.Header, body string) {
	t.Helper()
	r, err := http.NewRequest(method, url, nil)
	must(t, err)
	r.Header.Set("Accept-Encoding", "gzip, identity")
	for _, field := range fields {
		name, value, _ := strings.Cut(field, ": ")
		r.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(r)
	must(t, err)
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	must(t, err)
	if encoding := response.Header.Get("Content-Encoding"); encoding != "" {
		t.Errorf("%s: encoded by %s", url, encoding)
	}
	return response.StatusCode, response.Header, string(b)
}

// TestParts gets parts of what is published, and not again what has not changed. Each server is
// asked for a part before anybody has got the whole from it.
func TestParts(t *testing.T) {
	directory, items := aStore(t)
	const source = "hbdalsf5lpf01x4dcknwx6xbn6n5km6k-hello-2.10.tar.gz"
	must(t, os.WriteFile(filepath.Join(directory, source), bytes.Repeat([]byte("source"), 9999), 0o444))
	sources := manifest(t, "StorePath: /gnu/store/"+source+"\nReferences: \n")
	items["hbdalsf5lpf01x4dcknwx6xbn6n5km6k"] = sources["hbdalsf5lpf01x4dcknwx6xbn6n5km6k"]
	// What compresses badly, so that there are many compressed blocks.
	must(t, os.WriteFile(directory+"/00000000000000000000000000000005-large", noise(7, 600e3), 0o444))
	serve := func() string {
		return server(t, publish.ServerOptions{Root: directory, Items: items, Compressions: []string{"zstd", "gzip", "none"}}).URL
	}
	upstream := serve()
	annotated := annotator(t, publish.AnnotatorOptions{Upstream: upstream, Root: directory, Capabilities: newCapabilities(t, nil), WaitFor: 1 << 30})
	for _, path := range []string{
		"/00000000000000000000000000000005.narinfo",
		"/nar/00000000000000000000000000000005-large",
		"/nar/gzip/00000000000000000000000000000005-large",
		"/nar/zstd/00000000000000000000000000000005-large",
		"/nar/zstd/00000000000000000000000000000002-tree",
		"/file/hello-2.10.tar.gz/sha256/0ssi1wpaf7plaswqqjwigppsg5fyh99vdlb9kzl7c9lng89ndq1i",
	} {
		for _, start := range []func() string{serve, serve, func() string { return annotated }} {
			checkParts(t, upstream+path, start()+path)
		}
	}
	// Each kind of a nar has a tag of its own, and so has each item.
	tags := map[string]string{}
	for _, path := range []string{"/nar/00000000000000000000000000000005-large", "/nar/gzip/00000000000000000000000000000005-large",
		"/nar/zstd/00000000000000000000000000000005-large", "/nar/zstd/00000000000000000000000000000001-file+plus"} {
		_, header, _ := request(t, "HEAD", upstream+path)
		if other := tags[header.Get("Etag")]; other != "" {
			t.Errorf("%s has the tag of %s", path, other)
		}
		tags[header.Get("Etag")] = path
	}
}

// checkParts gets from second parts of what first has.
func checkParts(t *testing.T, first, second string) {
	t.Helper()
	if strings.HasSuffix(first, ".narinfo") {
		first = second // an annotated one is another
	}
	status, header, whole := request(t, "GET", first)
	tag := header.Get("Etag")
	if status != 200 || len(tag) < 10 || tag[0] != '"' || header.Get("Accept-Ranges") != "bytes" {
		t.Fatalf("%s: status %d, header %v", first, status, header)
	}
	n := len(whole)
	for name, c := range map[string]struct {
		fields []string
		status int
		body   string
		length int
	}{
		"resumed":          {[]string{fmt.Sprintf("Range: bytes=%d-", n/2), "If-Range: " + tag}, 206, whole[n/2:], n - n/2},
		"middle":           {[]string{fmt.Sprintf("Range: bytes=%d-%d", n/3, n/2)}, 206, whole[n/3 : n/2+1], n/2 + 1 - n/3},
		"end":              {[]string{"Range: bytes=-7"}, 206, whole[n-7:], 7},
		"other tag":        {[]string{"Range: bytes=7-", `If-Range: "other"`}, 200, whole, n},
		"weak tag":         {[]string{"Range: bytes=7-", "If-Range: W/" + tag}, 200, whole, n},
		"several":          {[]string{"Range: bytes=1-2,7-9"}, 200, whole, -1},
		"nothing":          {[]string{"Range: bytes=-0"}, 200, whole, -1},
		"other unit":       {[]string{"Range: items=0-1"}, 200, whole, -1},
		"beyond the end":   {[]string{fmt.Sprintf("Range: bytes=%d-", n)}, 416, "", -1},
		"known":            {[]string{"If-None-Match: " + tag}, 304, "", -1},
		"known otherwise":  {[]string{`If-None-Match: "other"`}, 200, whole, n},
		"for another file": {[]string{`If-Match: "other"`, "Range: bytes=7-"}, 412, "", -1},
	} {
		status, header, body := request(t, "GET", second, c.fields...)
		if status != c.status || body != c.body && status < 400 || status < 400 && header.Get("Etag") != tag {
			t.Errorf("%s: %s: status %d, %d bytes, header %v; want status %d, %d bytes", second, name, status, len(body), header, c.status, len(c.body))
		}
		if got := header.Get("Content-Length"); c.length >= 0 && got != fmt.Sprint(c.length) {
			t.Errorf("%s: %s: length %q instead of %d", second, name, got, c.length)
		}
	}
	for _, fields := range [][]string{nil, {"Range: bytes=7-"}} {
		status, header, body := request(t, "HEAD", second, fields...)
		length := header.Get("Content-Length")
		live := length == "" && strings.Contains(second, "/nar/") // and compressed, perhaps
		if status != 200 || header.Get("Etag") != tag || body != "" || length != fmt.Sprint(n) && !live {
			t.Errorf("%s: HEAD: status %d, header %v", second, status, header)
		}
	}
}

// TestCompressedForm checks that nars are compressed to the same bytes as ever. If they are not any
// more, compress.Form must be changed with this test: it is in the ETags that promise them.
func TestCompressedForm(t *testing.T) {
	const item = "00000000000000000000000000000001-item"
	var text bytes.Buffer
	for i := range int64(200000) {
		fmt.Fprintln(&text, i*i%1009, i)
	}
	directory, items := anItem(t, item, text.Bytes())
	h := server(t, publish.ServerOptions{Root: directory, Items: items})
	for compression, want := range map[string]string{
		"gzip": "7f01172487a11629f83119b8aa7d4cb81b973ed2ec3af7c42bcfefe98ef511a6",
		"zstd": "25c63bfe65099b620418ca582b3b865bb496d5fa3cae774715716250cac66813",
	} {
		_, header, body := request(t, "GET", h.URL+"/nar/"+compression+"/"+item)
		if got := fmt.Sprintf("%x", sha256.Sum256([]byte(body))); got != want || !strings.HasSuffix(header.Get("Etag"), "-"+compression+`-1"`) {
			t.Errorf("%s: SHA-256 %s, ETag %s", compression, got, header.Get("Etag"))
		}
	}
}

// TestBodies announces bodies that do not come: nobody waits for them.
func TestBodies(t *testing.T) {
	directory, items := aStore(t)
	h := server(t, publish.ServerOptions{Root: directory, Items: items})
	for _, body := range []string{"Content-Length: 1000", "Content-Length: 1000000", "Transfer-Encoding: chunked"} {
		for _, method := range []string{"GET", "POST"} {
			conn, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "http://"))
			must(t, err)
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(2 * time.Minute))
			fmt.Fprintf(conn, "%s /nix-cache-info HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", method, body)
			answer, err := io.ReadAll(conn)
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 413 ") {
				t.Errorf("%s, %s: error %v, answer %q", method, body, err, answer)
			}
		}
	}
}

// TestStalled has many clients that ask for nars and read nothing: few nars are compressed at a
// time, and all clients are cut off, or told to come later.
func TestStalled(t *testing.T) {
	t.Parallel()
	const item = "00000000000000000000000000000001-item"
	contents := noise(0, 32<<20) // more than sockets hold
	directory, items := anItem(t, item, contents)
	s := newServer(t, publish.ServerOptions{Root: directory, Items: items, StallTimeout: time.Second, Log: func(string, ...any) {}})
	var done atomic.Int64
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer done.Add(1)
		s.ServeHTTP(w, r)
	}))
	defer h.Close()
	// Who sends a nar has the file open, until the next one may begin. New descriptors take the lowest
	// numbers that are free, so that none counts twice.
	file, err := os.Stat(filepath.Join(directory, item))
	must(t, err)
	open := func() (n int) {
		descriptors, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		for _, d := range descriptors {
			if info, err := os.Stat("/proc/self/fd/" + d.Name()); err == nil && os.SameFile(info, file) {
				n++
			}
		}
		return n
	}
	clients := 16 * runtime.GOMAXPROCS(0)
	for i := range clients {
		conn, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "http://"))
		must(t, err)
		defer conn.Close()
		fmt.Fprintf(conn, "GET /nar/%s%s HTTP/1.1\r\nHost: x\r\n\r\n", []string{"zstd/", "gzip/", "zstd/", ""}[i%4], item)
	}
	// They do not keep others from what is small.
	wantStatus(t, h.URL+"/00000000000000000000000000000001.narinfo", 200)
	deadline, most := time.Now().Add(10*time.Minute), 0
	for done.Load() < int64(clients+1) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
		most = max(most, open())
	}
	if n := done.Load(); n != int64(clients+1) {
		t.Errorf("%d requests of %d have come to an end", n, clients+1)
	}
	if may := clients / 2; most > may || most == 0 { // a quarter is plain, and a quarter may be compressed
		t.Errorf("%d nars at a time instead of at most %d, of which %d are plain", most, may, clients/4)
	}
	// Nor from what is large. Where the machine is busy, this client may stall, too.
	for n := int64(0); n < int64(len(contents)); {
		response, err := http.Get(h.URL + "/nar/zstd/" + item)
		must(t, err)
		n, err = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if n < int64(len(contents)) && time.Now().After(deadline) {
			t.Fatalf("afterwards: %s, %d bytes, %v", response.Status, n, err)
		}
	}
}

// TestCutOff sends a nar, whose end is that of the connection for clients of HTTP/1.0 like nginx,
// and fails in the middle: no proxy must take what has come for the whole of it.
func TestCutOff(t *testing.T) {
	const item = "00000000000000000000000000000001-item"
	directory := t.TempDir()
	must(t, os.Mkdir(directory+"/"+item, 0o755))
	must(t, os.WriteFile(directory+"/"+item+"/a", noise(0, 32<<20), 0o444)) // more than sockets hold
	must(t, os.WriteFile(directory+"/"+item+"/b", nil, 0o444))
	s := newServer(t, publish.ServerOptions{Root: directory, Items: manifest(t, "StorePath: /gnu/store/"+item+"\nReferences: \n")})
	h := httptest.NewUnstartedServer(nil)
	gate := admission.New(4, h.Listener, new(admission.Counts), nil)
	h.Listener, h.Config = gate, gate.Server(s)
	h.Start()
	defer h.Close()
	for _, cut := range []bool{false, true} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(h.URL, "http://"))
		must(t, err)
		defer conn.Close()
		fmt.Fprintf(conn, "GET /nar/zstd/%s HTTP/1.0\r\n\r\n", item)
		_, err = io.ReadFull(conn, make([]byte, 1000))
		must(t, err)
		if cut {
			must(t, os.Remove(directory+"/"+item+"/b"))
		}
		if n, err := io.Copy(io.Discard, conn); errors.Is(err, syscall.ECONNRESET) != cut {
			t.Errorf("cut off: %v; the connection ends after %d bytes: %v", cut, n, err)
		}
	}
}

// TestUnpublishable offers no items whose nars cannot be made, and deep ones that can.
func TestUnpublishable(t *testing.T) {
	directory := t.TempDir()
	name := func(i int) string { return fmt.Sprintf("%032d-item", i) }
	deep := directory + "/" + name(1)
	for path, i := deep, 0; i < 400; path, i = path+"/d", i+1 {
		must(t, os.Mkdir(path, 0o755))
	}
	must(t, os.MkdirAll(directory+"/"+name(2)+"/x", 0o755))
	must(t, syscall.Mkfifo(directory+"/"+name(2)+"/x/pipe", 0o644))
	must(t, os.WriteFile(directory+"/"+name(3), []byte("not what it was"), 0o644))
	text := ""
	for i := range 3 {
		// Somebody has told the hash, so that it need not be computed.
		text += "StorePath: /gnu/store/" + name(i+1) + "\nReferences: \n"
		if i > 0 {
			text += "NarHash: sha256:0" + strings.Repeat("1", 51) + "\nNarSize: 1000\n"
		}
		text += "\n"
	}
	items := manifest(t, text)
	var pipe atomic.Int64 // how often it is told
	h := server(t, publish.ServerOptions{
		Root: directory, Items: items, Capabilities: newCapabilities(t, nil), WaitFor: 1 << 20,
		Log: func(format string, a ...any) {
			if strings.Contains(fmt.Sprintf(format, a...), "/pipe") {
				pipe.Add(1)
			}
		},
	})
	for path, want := range map[string]int{
		"/00000000000000000000000000000001.narinfo": 200,
		"/nar/zstd/" + name(1):                      200,
		"/00000000000000000000000000000002.narinfo": 404,
		"/nar/zstd/" + name(2):                      404,
		"/nar/" + name(2):                           404,
		"/00000000000000000000000000000003.narinfo": 404,
	} {
		if status, _, _ := complete(t, h.URL+path); status != want {
			t.Errorf("%s: status %d instead of %d", path, status, want)
		}
	}
	if n := pipe.Load(); n != 1 {
		t.Errorf("that one cannot be published is logged %d times", n)
	}
	var want bytes.Buffer
	nar.Write(&want, nar.NewTree(deep))
	if _, _, got := request(t, "GET", h.URL+"/nar/"+name(1)); got != want.String() {
		t.Error("a deep item is another nar")
	}
}

// TestDamagedCapability changes each byte of what is kept of a capability: it is noticed.
func TestDamagedCapability(t *testing.T) {
	path, narHash := aTree(t)
	cache := t.TempDir()
	c := publish.NewCapabilities(cache, nil, 2, logger(t))
	want, err := find(c, path, narHash)
	c.Close()
	must(t, err)
	name := cache + "/00000000000000000000000000000002.json"
	text, err := os.ReadFile(name)
	must(t, err)
	for i := range text {
		damaged := bytes.Clone(text)
		if damaged[i] = 'A'; bytes.Equal(damaged, text) {
			damaged[i] = 'B'
		}
		must(t, os.WriteFile(name, damaged, 0o644))
		var logged atomic.Int64
		c := publish.NewCapabilities(cache, nil, 2, func(string, ...any) { logged.Add(1) })
		if got, ok := c.Known(path, narHash); ok {
			t.Errorf("byte %d changed from %q: known as %v", i, text[i:i+1], got)
		}
		if logged.Load() == 0 {
			t.Errorf("byte %d: nothing is logged", i)
		}
		c.Close()
	}
	c = publish.NewCapabilities(cache, nil, 2, logger(t))
	defer c.Close()
	if got, err := find(c, path, narHash); err != nil || got != want {
		t.Errorf("found again: %v, error %v", got == want, err)
	}
	if again, err := os.ReadFile(name); err != nil || !bytes.Equal(again, text) {
		t.Errorf("what is kept is %q, error %v", again, err)
	}
}
