// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// noise is contents that are nowhere like elsewhere.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(uint64(n), 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// abort ends an answer in the middle.
func abort(w http.ResponseWriter) {
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

// A cuttingServer serves contents of which each answer brings only a part.
type cuttingServer struct {
	contents []byte
	modified time.Time
	each     int  // bytes of an answer
	stall    bool // instead of a cut, silence
	header   func(h http.Header, n int)
	lie      func(w http.ResponseWriter, r *http.Request, n int) bool // answers itself

	mu       sync.Mutex
	requests []string // the fields Range and If-Range
}

func (s *cuttingServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	n := len(s.requests)
	s.requests = append(s.requests, r.Header.Get("Range")+" if "+r.Header.Get("If-Range"))
	s.mu.Unlock()
	if s.header != nil {
		s.header(w.Header(), n)
	}
	if n > 0 && s.lie != nil && s.lie(w, r, n) {
		return
	}
	limited := &limitedWriter{w, s.each}
	http.ServeContent(limited, r, "nar", s.modified, bytes.NewReader(s.contents))
	if limited.left == 0 {
		if s.stall {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
		abort(w)
	}
}

func (s *cuttingServer) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests
}

type limitedWriter struct {
	http.ResponseWriter
	left int
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p[:min(len(p), w.left)])
	w.left -= n
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return n, err
}

func tag(h http.Header, n int) { h.Set("ETag", `"one"`) }

// quick is a client in the network that does not wait long before it resumes.
func quick(t *testing.T, network *sourcetest.Network, resumed *atomic.Int64) *mirror.Client {
	return client(t, mirror.Options{
		Dial: network.Dial, ResumeDelay: time.Millisecond, NarTimeout: time.Second,
		Note: func(format string, _ ...any) {
			if strings.Contains(format, "going on") {
				resumed.Add(1)
			}
		},
	})
}

// TestResume reads nars that are cut off, from servers that let them be resumed.
func TestResume(t *testing.T) {
	contents := noise(1 << 20)
	long := time.Date(1994, time.November, 6, 8, 49, 37, 0, time.UTC)
	for name, test := range map[string]struct {
		server    *cuttingServer
		most      int64
		condition string
	}{
		"by an entity tag":               {&cuttingServer{each: 300000, header: tag}, 3, `"one"`},
		"by a date":                      {&cuttingServer{each: 300000, modified: long}, 3, long.Format(http.TimeFormat)},
		"after silence":                  {&cuttingServer{each: 600000, header: tag, stall: true}, 1, `"one"`},
		"many small parts with progress": {&cuttingServer{each: 70000, header: tag}, 14, `"one"`},
		"after errors of the server": {&cuttingServer{each: 600000, header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n < 4 {
				http.Error(w, "wait", http.StatusServiceUnavailable)
			}
			return n < 4
		}}, 1, `"one"`},
		"in parts that the server chooses": {&cuttingServer{each: 400000, header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool {
			var first int
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &first)
			last := min(first+300000, len(contents)) - 1
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(contents)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(contents[first : last+1])
			return true
		}}, 3, `"one"`},
	} {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			test.server.contents = contents
			url := servingAt(t, network.Listen(), test.server.ServeHTTP)
			var resumed atomic.Int64
			got, err := read(t, quick(t, network, &resumed), url)
			if err != nil || got != string(contents) {
				t.Errorf("%d bytes, error %v; asked %q", len(got), err, test.server.asked())
			}
			if n := resumed.Load(); n != test.most {
				t.Errorf("resumed %d times, want %d", n, test.most)
			}
			for i, request := range test.server.asked() {
				if want := " if " + test.condition; i > 0 && !strings.HasSuffix(request, want) {
					t.Errorf("request %d: %q, want %q", i, request, want)
				}
			}
		})
	}
}

// TestNotResumed checks that what a server sends is not taken for the rest of something else, and
// that there is an end to trying.
func TestNotResumed(t *testing.T) {
	contents, others := noise(1<<20), noise(1<<20 + 1)[1:]
	part := func(field string, body []byte) func(w http.ResponseWriter, r *http.Request, n int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Range", field)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(body)
			return true
		}
	}
	const each = 600000
	rest := contents[each:]
	for name, test := range map[string]struct {
		server      *cuttingServer
		least, most int // requests
		want        string
	}{
		"always cut": {&cuttingServer{}, 4, 4, "connection was closed too early"}, // restarted three times
		"other contents": {&cuttingServer{header: func(h http.Header, n int) { h.Set("ETag", fmt.Sprintf(`"%d"`, n)) },
			lie: func(w http.ResponseWriter, r *http.Request, n int) bool {
				w.Write(others)
				return true
			}}, 2, 2, "changed"},
		"other length of all": {&cuttingServer{lie: func(w http.ResponseWriter, r *http.Request, n int) bool { w.Write(contents[1:]); return true }}, 2, 2, "changed"},
		"gone":                {&cuttingServer{header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool { http.NotFound(w, r); return true }}, 2, 2, "404"},
		"no such range":       {&cuttingServer{header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool { w.WriteHeader(416); return true }}, 2, 2, "416"},
		"redirection": {&cuttingServer{header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
			return true
		}}, 2, 2, "302"},
		"no Content-Range":     {&cuttingServer{header: tag, lie: part("", rest)}, 3, 3, "makes no sense"},
		"odd Content-Range":    {&cuttingServer{header: tag, lie: part("bytes 600000-1048575", rest)}, 3, 3, "makes no sense"},
		"other unit":           {&cuttingServer{header: tag, lie: part("pages 600000-1048575/1048576", rest)}, 3, 3, "makes no sense"},
		"beyond the end":       {&cuttingServer{header: tag, lie: part("bytes 600000-1048576/1048576", append(bytes.Clone(rest), 1))}, 3, 3, "makes no sense"},
		"too large a number":   {&cuttingServer{header: tag, lie: part("bytes 600000-99999999999999999999/*", rest)}, 3, 3, "makes no sense"},
		"other start":          {&cuttingServer{header: tag, lie: part("bytes 0-1048575/1048576", contents)}, 3, 3, "instead of"},
		"other length":         {&cuttingServer{header: tag, lie: part("bytes 600000-1048575/1048577", rest)}, 3, 3, "instead of"},
		"other Content-Length": {&cuttingServer{header: tag, lie: part("bytes 600000-1048575/1048576", rest[:1000])}, 3, 3, "for 1000 bytes"},
		"other tag": {&cuttingServer{header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("ETag", `"two"`)
			return part("bytes 600000-1048575/1048576", rest)(w, r, n)
		}}, 2, 2, "changed"},
		"always an error": {&cuttingServer{header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.WriteHeader(http.StatusBadGateway)
			return true
		}}, 7, 7, "connection was closed too early"},
		"a byte at a time": {&cuttingServer{header: tag, each: 1}, 7, 7, "connection was closed too early"},
		"nothing more":     {&cuttingServer{header: tag, lie: func(w http.ResponseWriter, r *http.Request, n int) bool { abort(w); return true }}, 2, 7, "connection was closed too early"},
	} {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			test.server.contents = contents
			if test.server.each == 0 {
				test.server.each = each
			}
			url := servingAt(t, network.Listen(), test.server.ServeHTTP)
			var resumed atomic.Int64
			c := quick(t, network, &resumed)
			got, err := read(t, c, url)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if !bytes.HasPrefix(contents, []byte(got)) {
				t.Errorf("%d bytes that are not the beginning", len(got))
			}
			if n := len(test.server.asked()); n < test.least || n > test.most {
				t.Errorf("%d requests, want %d to %d: %q", n, test.least, test.most, test.server.asked())
			}
			if c.Down(url) != nil {
				t.Error("the server counts as down")
			}
		})
	}
}

// TestRestart reads nars that are cut off, from servers that do not let them be resumed: all is
// requested again, and what has been had already passed over.
func TestRestart(t *testing.T) {
	contents := noise(1 << 20)
	for name, header := range map[string]func(h http.Header, n int){
		"no validator":         nil,
		"ranges are not known": tag,
		"ranges are wrong":     tag,
		"weak tag":             func(h http.Header, n int) { h.Set("ETag", `W/"one"`) },
		"odd tag":              func(h http.Header, n int) { h["Etag"] = []string{`"a" "b"`} },
		"another tag":          func(h http.Header, n int) { h.Set("ETag", fmt.Sprintf(`"%d"`, n)) },
		"weak and date": func(h http.Header, n int) {
			h.Set("ETag", `W/"1"`)
			h.Set("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")
		},
		"modified just now": func(h http.Header, n int) {
			h.Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
		},
		"no date of the answer": func(h http.Header, n int) {
			h.Set("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")
			h["Date"] = nil
		},
	} {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			s := &cuttingServer{contents: contents, each: 600000, header: header}
			s.lie = func(w http.ResponseWriter, r *http.Request, n int) bool {
				switch {
				case name == "ranges are wrong" && r.Header.Get("Range") != "":
					w.Header().Set("Content-Range", "bytes 0-9/10")
					w.WriteHeader(http.StatusPartialContent)
					w.Write(contents[:10])
					return true
				case n < 3 && !strings.HasPrefix(name, "ranges"):
					return false
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(contents)))
				w.Write(contents)
				return true
			}
			url := servingAt(t, network.Listen(), s.ServeHTTP)
			var resumed atomic.Int64
			got, err := read(t, quick(t, network, &resumed), url)
			if err != nil || got != string(contents) || resumed.Load() == 0 {
				t.Errorf("%d bytes, error %v; asked %q", len(got), err, s.asked())
			}
		})
	}
}

// TestDeadConnection asks again soon, over another connection, where one is dead and nothing says
// so, as after a change of network; not so soon where all would come again, or silence is usual.
func TestDeadConnection(t *testing.T) {
	contents := noise(1 << 20)
	for name, test := range map[string]struct {
		tag   bool
		early bool          // another nar has come
		pause time.Duration // of an answer that goes on
		dead  []int         // after how many bytes answers end in silence; 0 is without a header
		want  time.Duration
		fails bool
	}{
		"in the middle":                {tag: true, dead: []int{600000}, want: 3 * time.Second},
		"in the middle, and again":     {tag: true, dead: []int{600000, 1000}, want: 9 * time.Second},
		"of a line that makes pauses":  {tag: true, pause: 2 * time.Second, dead: []int{600000}, want: 8 * time.Second},
		"where all would come again":   {dead: []int{600000}, want: 20 * time.Second},
		"before an answer":             {early: true, dead: []int{0}, want: 3 * time.Second},
		"before two answers":           {early: true, dead: []int{0, 0}, want: 63 * time.Second, fails: true},
		"before an answer as never":    {dead: []int{0}, want: 60 * time.Second, fails: true},
		"before the rest, and on then": {tag: true, dead: []int{600000, 0}, want: 9 * time.Second},
	} {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			var n atomic.Int64
			url := servingAt(t, network.Listen(), func(w http.ResponseWriter, r *http.Request) {
				time.Sleep(time.Millisecond)
				if r.URL.Path == "/first" {
					io.WriteString(w, "nar")
					return
				}
				if test.tag {
					tag(w.Header(), 0)
				}
				i := int(n.Add(1)) - 1
				if i >= len(test.dead) {
					http.ServeContent(w, r, "nar", time.Time{}, bytes.NewReader(contents))
					return
				}
				if test.dead[i] > 0 {
					http.ServeContent(&limitedWriter{w, test.dead[i]}, r, "nar", time.Time{}, bytes.NewReader(contents))
					w.(http.Flusher).Flush()
				}
				if test.pause > 0 {
					time.Sleep(test.pause)
					w.Write(contents[test.dead[i]:][:1])
					w.(http.Flusher).Flush()
				}
				<-r.Context().Done()
			})
			c := client(t, mirror.Options{Dial: network.Dial, ResumeDelay: time.Millisecond})
			if test.early {
				expect(t, c, url+"/first", "nar")
			}
			begin := time.Now()
			got, err := read(t, c, url+"/nar")
			if failed := err != nil || got != string(contents); failed != test.fails {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
			if took := time.Since(begin) - test.pause; took < test.want || took > test.want+time.Second {
				t.Errorf("took %v, want %v", took, test.want)
			}
		})
	}
}

// TestResumeWithoutLength resumes a nar of unknown length.
func TestResumeWithoutLength(t *testing.T) {
	contents := noise(500000)
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		s := &cuttingServer{contents: contents, each: 200000}
		url := servingAt(t, network.Listen(), func(w http.ResponseWriter, r *http.Request) {
			tag(w.Header(), 0)
			if len(s.asked()) == 0 {
				s.mu.Lock()
				s.requests = append(s.requests, "")
				s.mu.Unlock()
				w.Write(contents[:100000]) // chunked
				abort(w)
			}
			s.ServeHTTP(w, r)
		})
		var resumed atomic.Int64
		expect(t, quick(t, network, &resumed), url, string(contents))
		if resumed.Load() != 2 {
			t.Errorf("resumed %d times", resumed.Load())
		}
	})
}

// TestResumeCancelled gives up while it waits to resume, and while the rest is asked for.
func TestResumeCancelled(t *testing.T) {
	contents := noise(1 << 20)
	enough := errors.New("enough")
	for _, delay := range []time.Duration{time.Hour, time.Millisecond} {
		cut, asked := make(chan struct{}), make(chan struct{})
		s := &cuttingServer{contents: contents, each: 300000, header: tag}
		s.lie = func(w http.ResponseWriter, r *http.Request, n int) bool {
			close(asked)
			<-r.Context().Done()
			return true
		}
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() {
				if len(s.asked()) == 1 {
					close(cut)
				}
			}()
			s.ServeHTTP(w, r)
		}))
		c := client(t, mirror.Options{ResumeDelay: delay})
		ctx, cancel := context.WithCancelCause(t.Context())
		n, err := c.OpenNar(ctx, server.URL, false)
		must(t, err)
		done := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, n)
			done <- err
		}()
		<-cut
		if delay < time.Second {
			<-asked
		}
		cancel(enough)
		if err := <-done; !errors.Is(err, enough) {
			t.Errorf("error %v", err)
		}
		n.Close()
		server.Close()
	}
}

// nginx serves a directory and returns its address, or skips the test.
func nginx(t *testing.T, www string) string {
	program, err := exec.LookPath("nginx")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/nginx"); err != nil {
			t.Skip("nginx is not installed")
		}
	}
	address := testhelp.FreeAddress()
	d := t.TempDir()
	text := fmt.Sprintf(`daemon off; worker_processes 1; pid %[1]s/nginx.pid; error_log %[1]s/log;
events { worker_connections 100; }
http { access_log off; default_type application/octet-stream;
client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
server { listen %[2]s; root %[3]s; } }
`, d, address, www)
	if os.Geteuid() == 0 {
		text = "user root;\n" + text
	}
	configuration := filepath.Join(d, "nginx.conf")
	must(t, os.WriteFile(configuration, []byte(text), 0o644))
	server := exec.Command(program, "-c", configuration, "-e", filepath.Join(d, "log"))
	must(t, server.Start())
	t.Cleanup(func() { server.Process.Signal(os.Interrupt); server.Wait() })
	for range 3000 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return address
		}
		time.Sleep(20 * time.Millisecond)
	}
	log, _ := os.ReadFile(filepath.Join(d, "log"))
	t.Fatalf("nginx does not come up: %s", log)
	return ""
}

// cutConn is a connection that is cut after so many bytes.
type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// TestResumeNginx reads from nginx over a link that cuts each connection.
func TestResumeNginx(t *testing.T) {
	www := t.TempDir()
	contents := noise(3 << 20)
	must(t, os.WriteFile(www+"/nar", contents, 0o644))
	before := time.Now().Add(-time.Minute)
	must(t, os.Chtimes(www+"/nar", before, before))
	url := "http://" + nginx(t, www) + "/nar"
	var resumed atomic.Int64
	note := func(format string, a ...any) {
		if resumed.Add(1) == 1 {
			t.Logf(format, a...)
		}
	}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		return &cutConn{conn, 1 << 20}, err
	}
	c := client(t, mirror.Options{ResumeDelay: time.Millisecond, Note: note, Dial: dial})
	expect(t, c, url, string(contents))
	if resumed.Load() < 3 {
		t.Errorf("resumed %d times", resumed.Load())
	}
	// One that is replaced in between is not mixed with what takes its place.
	n, err := c.OpenNar(t.Context(), url, false)
	must(t, err)
	defer n.Close()
	b := make([]byte, 1000)
	if _, err := io.ReadFull(n, b); err != nil {
		t.Fatal(err)
	}
	must(t, os.WriteFile(www+"/new", noise(3<<20 + 1)[:3<<20], 0o644))
	must(t, os.Rename(www+"/new", www+"/nar"))
	got, err := io.ReadAll(n)
	if err == nil || !strings.Contains(err.Error(), "changed") || !bytes.HasPrefix(contents[1000:], got) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
}
