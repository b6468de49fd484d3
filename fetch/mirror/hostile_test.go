// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

// TestSecrets checks that no message shows what stands before the host of a URL.
func TestSecrets(t *testing.T) {
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		for {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			switch request.URL.Path {
			case "/base/loop":
				io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: loop\r\nContent-Length: 0\r\n\r\n")
			case "/base/away":
				io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: ftp://alice:s3cret@x/\r\nContent-Length: 0\r\n\r\n")
			case "/base/bad":
				io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: http://alice:s3cret@x:y/\r\nContent-Length: 0\r\n\r\n")
			case "/base/cut":
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n1")
				return
			case "/base/broken":
				return
			default:
				io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
			}
		}
	})
	secret := strings.Replace(server, "http://", "http://alice:s3cret@", 1)
	var shown []string
	c := client(t, mirror.Options{ResumeDelay: time.Millisecond, Note: func(format string, a ...any) { shown = append(shown, fmt.Sprintf(format, a...)) }})
	for _, name := range []string{"/loop", "/away", "/bad", "/cut", "/broken", "/absent"} {
		_, err := read(t, c, secret+name)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		shown = append(shown, err.Error())
	}
	for _, bad := range []string{"http://alice:s3cret@host:port/", "ftp://alice:s3cret@host/", "http://alice:s3cret@/", "http://alice:s3cret@[::1/"} {
		if err := mirror.CheckURL(bad); err == nil {
			t.Errorf("%q is a URL", bad)
		} else {
			shown = append(shown, err.Error())
		}
	}
	for _, message := range shown {
		if strings.Contains(message, "s3cret") || strings.Contains(message, "alice") {
			t.Errorf("shown: %s", message)
		}
	}
}

// TestPipelinesKept checks that a server that has closed connections that were not used is still
// sent pipelines, and so is one that bounds the requests on a connection.
func TestPipelinesKept(t *testing.T) {
	for _, perConnection := range []int{0, 100} { // 0 is as many as there are
		var requests, piped atomic.Int64
		var mu sync.Mutex
		var open []net.Conn
		server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			for i := 1; ; i++ {
				request, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				requests.Add(1)
				if r.Buffered() > 0 {
					piped.Add(1)
				}
				if i == perConnection {
					answer(conn, request, "Connection: close\r\n")
					return
				}
				answer(conn, request, "")
			}
		})
		c := client(t, mirror.Options{})
		for range 3 {
			requests.Store(0)
			piped.Store(0)
			collectAll(t, c, server, hashes(1000))
			if piped.Load() < requests.Load()/4 {
				t.Errorf("%d of %d requests were in a pipeline", piped.Load(), requests.Load())
			}
			mu.Lock()
			for _, conn := range open {
				if perConnection == 0 {
					conn.Close()
				}
			}
			mu.Unlock()
		}
	}
}

// TestOneConnectionOnly asks a server that takes no connection beside the first.
func TestOneConnectionOnly(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wait sync.WaitGroup
	defer wait.Wait()
	wait.Go(func() {
		conn, err := l.Accept()
		l.Close()
		if err != nil {
			return
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		for reply(conn, r) {
		}
	})
	c := mirror.NewClient(mirror.Options{})
	defer c.Close()
	server := "http://" + l.Addr().String() + "/base"
	hs := hashes(300)
	for range 2 {
		collectAll(t, c, server, hs)
	}
	must(t, c.Down(server))
}

// TestOneBadItem asks servers that never answer about one item, or break at it: the others are
// answered for, and the server is asked again.
func TestOneBadItem(t *testing.T) {
	for name, silent := range map[string]bool{"silent": true, "breaks": false} {
		partInNetwork(t, name, func(t *testing.T, network *sourcetest.Network) {
			hs := hashes(200)
			server := rawServerAt(t, network.Listen(), func(n int, conn net.Conn, r *bufio.Reader) {
				for {
					b, err := r.Peek(60)
					if bad := strings.Contains(string(b), hs[20]); bad && silent {
						io.Copy(io.Discard, r)
					} else if err != nil || bad || !reply(conn, r) {
						return
					}
				}
			})
			options := mirror.Options{Dial: network.Dial, NarinfoTimeout: 500 * time.Millisecond}
			if silent {
				// If all else has been answered on other connections, the server seems to be silent.
				options.MaxConnections = 1
			}
			c := client(t, options)
			answers, err := collect(t.Context(), c, server, hs)
			if !errors.As(err, new(*mirror.ServerError)) || !strings.Contains(err.Error(), hs[20]) {
				t.Errorf("error %v does not name the item", err)
			}
			check(t, answers, append(slices.Clone(hs[:20]), hs[21:]...))
			if err := c.Down(server); err != nil {
				t.Errorf("the server counts as down: %v", err)
			}
		})
	}
}

// TestLongPath asks a server whose URL is so long that a pipeline of requests does not fit into the
// buffers between us.
func TestLongPath(t *testing.T) {
	long := "/" + strings.Repeat("long/", 20000)
	server := serving(t, func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = "/base/" + strings.TrimPrefix(r.URL.Path, long)
		serve(w, r)
	})
	collectAll(t, client(t, mirror.Options{}), server.URL+long, hashes(100))
}

// TestTargets checks that servers see paths as they stand in URLs.
func TestTargets(t *testing.T) {
	var mu sync.Mutex
	var targets, hosts []string
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		for {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			mu.Lock()
			targets = append(targets, request.RequestURI)
			hosts = append(hosts, request.Host)
			mu.Unlock()
			io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
		}
	})
	root := strings.TrimSuffix(server, "/base")
	for raw, want := range map[string]string{
		"/a%2Bb+c":          "/a%2Bb+c",
		"/a%2Bb|c":          "/a%2Bb|c",
		"/a%2fb\"%2F":       "/a%2fb\"%2F",
		"//x/../y/./z":      "//x/../y/./z",
		"/q?a=%2B+b?c":      "/q?a=%2B+b?c",
		"?q":                "/?q",
		"":                  "/",
		"/f#fragment":       "/f",
		"/a b":              "/a%20b",
		"/\xc3\xa4":         "/%C3%A4",
		"/at@sign:and:more": "/at@sign:and:more",
	} {
		targets = nil
		read(t, client(t, mirror.Options{}), root+raw)
		if len(targets) != 1 || targets[0] != want {
			t.Errorf("%q: the server was asked for %q, want %q", raw, targets, want)
		}
	}
	targets = nil
	collect(t.Context(), client(t, mirror.Options{}), root+"/a%2Bb|c/?q#f", hashes(1))
	if want := "/a%2Bb|c/" + hash0 + ".narinfo"; len(targets) != 1 || targets[0] != want {
		t.Errorf("the server was asked for %q, want %q", targets, want)
	}
	for _, host := range hosts {
		if host != strings.TrimPrefix(root, "http://") {
			t.Errorf("Host: %s", host)
		}
	}
}

// TestIPv6 checks the form of addresses in requests.
func TestIPv6(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	var host atomic.Value
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host.Store(r.Host)
		serve(w, r)
	})}
	go server.Serve(l)
	defer server.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for _, name := range []string{"[::1]", "[0::1]", "[::1%25lo]"} {
		hs := hashes(5)
		answers, err := collect(t.Context(), client(t, mirror.Options{}), "http://"+name+":"+port+"/base", hs)
		if err != nil {
			t.Error(err)
			continue
		}
		check(t, answers, hs)
		if h := host.Load().(string); strings.Contains(h, "%") || !strings.HasPrefix(h, "[") {
			t.Errorf("%s: Host: %s", name, h)
		}
	}
}

// TestTLSWithoutNotice reads a body that ends when the connection does, from a server that does not
// say so by the means of TLS, as many do not.
func TestTLSWithoutNotice(t *testing.T) {
	config := &tls.Config{Certificates: []tls.Certificate{testhelp.Certificate()}}
	server := rawServer(t, func(n int, raw net.Conn, _ *bufio.Reader) {
		conn := tls.Server(raw, config)
		if request, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
			if strings.HasSuffix(request.URL.Path, "/known") {
				io.WriteString(conn, "Content-Length: 100\r\n")
			}
			io.WriteString(conn, "\r\nall of it")
		}
		raw.Close() // without an alert
	})
	server = strings.Replace(server, "http:", "https:", 1)
	c := client(t, mirror.Options{ResumeDelay: time.Millisecond})
	expect(t, c, server+"/live", "all of it")
	if _, err := read(t, c, server+"/known"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("of known length: error %v", err)
	}
}

// TestAnsweredUnread asks a server that answers and closes the connection without reading.
func TestAnsweredUnread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := client(t, mirror.Options{Dial: func(context.Context, string, string) (net.Conn, error) {
			ours, _ := net.Pipe()
			return &unread{Conn: ours, answer: strings.NewReader("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")}, nil
		}})
		answers, err := collect(t.Context(), c, "http://server", []string{"x"})
		if err != nil || answers["x"].Status != http.StatusForbidden {
			t.Errorf("answers %v, error %v", answers, err)
		}
	})
}

type unread struct {
	net.Conn
	answer io.Reader
	closed atomic.Bool
}

func (u *unread) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func (u *unread) Read(p []byte) (int, error) {
	time.Sleep(time.Second)
	if u.closed.Load() {
		return 0, net.ErrClosed
	}
	return u.answer.Read(p)
}

func (u *unread) Close() error {
	u.closed.Store(true)
	return u.Conn.Close()
}

// TestTunnel checks which answers of a proxy make a tunnel.
func TestTunnel(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 200 Yes\r\n\r\n":                                   "",
		"HTTP/1.0 200 Yes\r\nContent-Length: 5\r\n\r\n":              "",
		"HTTP/1.1 204 Yes\r\n\r\n":                                   "",
		"HTTP/1.1 100 Wait\r\n\r\nHTTP/1.1 200 Yes\r\n\r\n":          "",
		"HTTP/1.1 407 Who are you?\r\nContent-Length: 0\r\n\r\n":     "407 Who are you?",
		"HTTP/1.1 302 There\r\nLocation: http://192.0.2.1/\r\n\r\n":  "302 There",
		"garbage\r\n\r\n":                                            "malformed",
		"HTTP/1.1 200 Yes\r\n" + strings.Repeat("X: y\r\n", 1<<17):   "",
		strings.Repeat("HTTP/1.1 100 Wait\r\n\r\n", 100) + "garbage": "",
	} {
		secure := httptest.NewTLSServer(http.HandlerFunc(serve))
		proxy := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(conn, answer)
			to, err := net.Dial("tcp", secure.Listener.Addr().String())
			if err != nil {
				return
			}
			defer to.Close()
			go func() { io.Copy(to, r); to.Close() }()
			io.Copy(conn, to)
		})
		c := client(t, mirror.Options{Getenv: func(name string) string {
			if name == "https_proxy" {
				return strings.TrimSuffix(proxy, "/base")
			}
			return ""
		}})
		hs := hashes(3)
		answers, err := collect(t.Context(), c, secure.URL+"/base", hs)
		good := want == "" && len(answer) < 1000
		switch {
		case good && err != nil:
			t.Errorf("%.100q: error %v", answer, err)
		case good:
			check(t, answers, hs)
		case err == nil || !strings.Contains(err.Error(), want):
			t.Errorf("%.100q: error %v, want %q", answer, err, want)
		}
		secure.Close()
	}
}

// TestDirectory checks that nothing in a directory hangs us or takes the other files away.
func TestDirectory(t *testing.T) {
	d := t.TempDir() + "/of a stick"
	must(t, os.Mkdir(d, 0o755))
	hs := hashes(8)
	file := func(i int) string { return d + "/" + hs[i] + ".narinfo" }
	for _, i := range []int{0, 7} {
		must(t, os.WriteFile(file(i), []byte("narinfo of "+hs[i]), 0o644))
	}
	for _, err := range []error{
		os.Mkdir(file(1), 0o755),
		unix.Mkfifo(file(2), 0o644),
		os.Symlink("/dev/zero", file(3)),
		os.Symlink(hs[4]+".narinfo", file(4)),
		os.Symlink(file(0), file(5)),
	} {
		must(t, err)
	}
	c := client(t, mirror.Options{})
	for _, server := range []string{"file://" + d, "file:" + d + "/", "file://localhost" + d, "file://" + strings.ReplaceAll(d, " ", "%20") + "/"} {
		answers, err := collect(t.Context(), c, server, hs)
		if err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: error %v about what is no file", server, err)
		}
		for i, h := range hs {
			a, ok := answers[h]
			switch i {
			case 0, 5, 7:
				if a.Status != 200 || !strings.HasPrefix(string(a.Body), "narinfo of ") {
					t.Errorf("%s: %d: %+v", server, i, a)
				}
			case 6:
				if !ok || a.Status != 404 {
					t.Errorf("%s: %d: %+v", server, i, a)
				}
			default:
				if ok && a.Status == 200 {
					t.Errorf("%s: %d: %+v", server, i, a)
				}
			}
		}
		for i := 1; i < 5; i++ {
			if _, err := read(t, c, server+"/"+hs[i]+".narinfo"); err == nil {
				t.Errorf("%s: %d can be read", server, i)
			}
		}
	}
}

// TestBoundedConnections checks that all that is asked of a server at the same time shares the
// connections that it gets.
func TestBoundedConnections(t *testing.T) {
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		server, connections := countingServer(t, network, func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Millisecond)
			serveBoth(w, r)
		})
		c := client(t, mirror.Options{Dial: network.Dial, MaxConnections: 3})
		var wait sync.WaitGroup
		for i := range 8 {
			wait.Go(func() {
				hs := hashes(100)
				answers, err := collect(t.Context(), c, server.URL+"/base", hs)
				if err != nil {
					t.Error(err)
				}
				check(t, answers, hs)
				for range 5 {
					if got, err := read(t, c, fmt.Sprint(server.URL, "/nar", i)); err != nil || got != "nar" {
						t.Error(got, err)
					}
				}
			})
		}
		wait.Wait()
		if most := connections.most.Load(); most > 3 {
			t.Errorf("%d connections at the same time", most)
		}
	})
}
