// SPDX-License-Identifier: GPL-3.0-or-later

package mirror_test

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
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
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
)

// TestRest asks a server that cannot be reached at first: it is asked again later by the same
// client, and no call waits meanwhile.
func TestRest(t *testing.T) {
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		c := client(t, mirror.Options{Dial: network.Dial})
		url := "http://192.0.2.1:80/base" // the first address that there will be
		for _, ask := range []func() error{
			func() error { _, err := collect(t.Context(), c, url, hashes(20)); return err },
			func() error { _, err := read(t, c, url+"/nar"); return err },
		} {
			if err := ask(); !errors.As(err, new(*mirror.ServerError)) || c.Down(url) == nil {
				t.Errorf("error %v", err)
			}
		}
		servingAt(t, network.Listen(), serve)
		for c.Down(url) != nil {
			time.Sleep(10 * time.Millisecond)
		}
		collectAll(t, c, url, hashes(20))
	})
}

// TestBusyServers asks servers that refuse more than some requests at a time, but for those that
// say that they have failed, and some requests in any case.
func TestBusyServers(t *testing.T) {
	for _, most := range []int64{1, 2, 4} {
		for _, status := range []int{503, 429, 502, 500, 504, 408, 425} {
			partInNetwork(t, fmt.Sprint(most, " at a time, ", status), func(t *testing.T, network *sourcetest.Network) {
				var now, count, refused atomic.Int64
				url := servingAt(t, network.Listen(), func(w http.ResponseWriter, r *http.Request) {
					defer now.Add(-1)
					if now.Add(1) > most && status != 500 || count.Add(1)%30 == 0 {
						refused.Add(1)
						w.WriteHeader(status)
						return
					}
					time.Sleep(2 * time.Millisecond)
					serve(w, r)
				})
				collectAll(t, client(t, mirror.Options{Dial: network.Dial}), url+"/base", hashes(100))
				if refused.Load() == 0 {
					t.Error("nothing was refused")
				}
			})
		}
	}
	for _, after := range []string{"", "3600"} {
		partInNetwork(t, "always, later "+after, func(t *testing.T, network *sourcetest.Network) {
			url := servingAt(t, network.Listen(), func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Retry-After", after)
				w.WriteHeader(503)
			})
			ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
			defer cancel()
			answers, err := collect(ctx, client(t, mirror.Options{Dial: network.Dial}), url, hashes(3))
			if err != nil || len(answers) != 3 || answers[hash0].Status != 503 {
				t.Errorf("%v, error %v", answers, err)
			}
		})
	}
}

// TestBadItems asks a server that fails at some items always, and at others the first time.
func TestBadItems(t *testing.T) {
	t.Parallel()
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		var asked sync.Map
		url := servingAt(t, network.Listen(), func(w http.ResponseWriter, r *http.Request) {
			_, again := asked.LoadOrStore(r.URL.Path, true)
			if strings.HasSuffix(r.URL.Path, "5.narinfo") || strings.HasSuffix(r.URL.Path, "7.narinfo") && !again {
				w.WriteHeader(500)
			} else {
				serve(w, r)
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
		defer cancel()
		answers, err := collect(ctx, client(t, mirror.Options{Dial: network.Dial}), url+"/base", hashes(40))
		must(t, err)
		for hash, a := range answers {
			if want := a.Status == 500; strings.HasSuffix(hash, "5") != want {
				t.Errorf("%s: status %d", hash, a.Status)
			}
		}
	})
}

// TestUnordered asks servers that answer what is in a pipeline from its end, or about another item
// each time.
func TestUnordered(t *testing.T) {
	for _, lying := range []bool{false, true} {
		server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
			for {
				var paths []string
				for len(paths) == 0 || r.Buffered() > 0 {
					request, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					paths = append(paths, request.URL.Path)
				}
				for _, path := range slices.Backward(paths) {
					hash := path[len("/base/") : len("/base/")+32]
					body := "StorePath: /gnu/store/" + hash + "-x\n"
					status := 200
					switch i, _ := strconv.Atoi(hash); {
					case lying:
						body = strings.ReplaceAll(body, "0", "1")
					case i%3 == 0:
						status, body = 404, ""
					}
					fmt.Fprintf(conn, "HTTP/1.1 %d Yes\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
				}
			}
		})
		answers, err := collect(t.Context(), client(t, mirror.Options{}), server, hashes(100))
		must(t, err)
		for i, hash := range hashes(100) {
			a, want := answers[hash], 200
			if !lying && i%3 == 0 {
				want = 404
			}
			if a.Status != want || want == 200 && lying == strings.Contains(string(a.Body), hash) {
				t.Errorf("%d: status %d, %q", i, a.Status, a.Body)
			}
		}
	}
}

// TestPipelineRefused asks servers that take several requests at once for a bad one, say so or not,
// and perhaps close the connection. One that is silent about the others is waited for once.
func TestPipelineRefused(t *testing.T) {
	const bad = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n"
	for _, refusal := range []string{bad + "Connection: close\r\n\r\n", bad + "\r\n", ""} {
		synctest.Test(t, func(t *testing.T) {
			var network sourcetest.Network
			server := rawServerAt(t, network.Listen(), func(_ int, conn net.Conn, r *bufio.Reader) {
				for {
					request, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					rest, _ := r.Discard(r.Buffered())
					if rest == 0 || refusal == "" {
						answer(conn, request, "")
					} else if io.WriteString(conn, refusal); strings.Contains(refusal, "close") {
						return
					}
				}
			})
			begin := time.Now()
			collectAll(t, client(t, mirror.Options{Dial: network.Dial}), server, hashes(40))
			if took := time.Since(begin); took >= 20*time.Second {
				t.Errorf("%q: it took %v", refusal, took)
			}
		})
	}
}

// TestAcknowledged has responses acknowledged at once: a server that has several small ones to send
// may wait for that with each.
func TestAcknowledged(t *testing.T) {
	server := rawServer(t, func(n int, conn net.Conn, r *bufio.Reader) {
		for reply(conn, r) {
		}
	})
	var dialed net.Conn
	c := client(t, mirror.Options{Dial: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		conn, err = dial.With(new(net.Dialer))(ctx, network, address)
		dialed = conn
		return conn, err
	}})
	for _, h := range hashes(20) {
		collectAll(t, c, server, []string{h})
		raw, err := dialed.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if at, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK); at != 1 || err != nil {
				t.Errorf("not acknowledged at once: %v, %v", at, err)
			}
		})
	}
}

// TestFewWorkers asks servers whose workers stay with a connection until it is closed, for narinfos
// and then for a nar, by two clients.
func TestFewWorkers(t *testing.T) {
	for _, workers := range []int{1, 4} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { fewWorkers(t, workers) })
		})
	}
}

func fewWorkers(t *testing.T, workers int) {
	free := make(chan bool, workers)
	var network sourcetest.Network
	server := rawServerAt(t, network.Listen(), func(n int, conn net.Conn, r *bufio.Reader) {
		free <- true
		defer func() { <-free }()
		for reply(conn, r) {
			time.Sleep(5 * time.Millisecond)
		}
	})
	begin := time.Now()
	hs := hashes(60)
	var wait sync.WaitGroup
	for range 2 {
		c := client(t, mirror.Options{Dial: network.Dial})
		collectAll(t, c, server, hs)
		wait.Go(func() {
			if _, err := read(t, c, server+"/nar"); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	t.Logf("it took %v", time.Since(begin))
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestSilentBeside asks a server that answers on one connection only. What was requested on others
// is requested on that one as soon as they are given up.
func TestSilentBeside(t *testing.T) {
	inNetwork(t, func(t *testing.T, network *sourcetest.Network) {
		var mu sync.Mutex
		var lost time.Time // when the last connection beside the first was given up
		server := rawServerAt(t, network.Listen(), func(n int, conn net.Conn, r *bufio.Reader) {
			if n > 0 {
				io.Copy(io.Discard, r)
				mu.Lock()
				defer mu.Unlock()
				lost = time.Now()
				return
			}
			for reply(conn, r) {
				time.Sleep(5 * time.Millisecond)
			}
		})
		collectAll(t, client(t, mirror.Options{Dial: network.Dial}), server, hashes(60))
		end := time.Now()
		synctest.Wait() // until the server has noticed
		mu.Lock()
		defer mu.Unlock()
		if after := end.Sub(lost); lost.IsZero() || after > 100*time.Millisecond {
			t.Errorf("the last answers came %v after the last other connection was given up", after)
		}
	})
}

// TestContentEncoding undoes what a proxy does to responses.
func TestContentEncoding(t *testing.T) {
	server := serving(t, func(w http.ResponseWriter, r *http.Request) {
		if accepted := r.Header.Get("Accept-Encoding"); accepted != "identity" {
			t.Errorf("Accept-Encoding: %s", accepted)
		}
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		defer z.Close()
		io.WriteString(z, "narinfo of "+strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/base/"), ".narinfo"))
	})
	c := client(t, mirror.Options{})
	collectAll(t, c, server.URL+"/base", hashes(20))
	expect(t, c, server.URL+"/base/nar", "narinfo of nar")
	for _, of := range []string{"aws-chunked", "zstd", "UTF-8", "gzip"} { // that is true of the file, or of nothing
		server := serving(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", of)
			serve(w, r)
		})
		collectAll(t, client(t, mirror.Options{}), server.URL+"/base", hashes(3))
	}
}

// TestNarinfosRedirected asks a server that sends everybody to another one.
func TestNarinfosRedirected(t *testing.T) {
	server := serving(t, serve)
	first := serving(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, server.URL+"/base"+r.URL.Path, http.StatusMovedPermanently)
	})
	collectAll(t, client(t, mirror.Options{}), first.URL, hashes(50))
	loop := serving(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) })
	if answers, err := collect(t.Context(), client(t, mirror.Options{}), loop.URL, hashes(1)); err != nil || answers[hash0].Status != http.StatusFound {
		t.Errorf("%v, error %v", answers, err)
	}
	// Each to a host of its own.
	var dials atomic.Int64
	far := func(ctx context.Context, network, address string) (net.Conn, error) {
		if strings.HasSuffix(address, ".example:80") {
			dials.Add(1)
			return nil, errors.New("it is far away")
		}
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	away := serving(t, func(w http.ResponseWriter, r *http.Request) {
		host := strings.TrimSuffix(r.URL.Path[1:], ".narinfo") + ".example"
		http.Redirect(w, r, "http://"+host+r.URL.Path, http.StatusFound)
	})
	collect(t.Context(), client(t, mirror.Options{Dial: far}), away.URL, hashes(1000))
	if n := dials.Load(); n < 10 || n > 300 {
		t.Errorf("%d connections", n)
	}
}

// silentAddress makes a loopback address neither take nor refuse connections at a port: its queue
// is full.
func silentAddress(t *testing.T, address string, port int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	to := &unix.SockaddrInet4{Port: port, Addr: netip.MustParseAddr(address).As4()}
	if err := unix.Bind(fd, to); err != nil {
		t.Skipf("no second loopback address: %v", err)
	}
	must(t, unix.Listen(fd, 0))
	for range 3 {
		filler, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		must(t, err)
		t.Cleanup(func() { unix.Close(filler) })
		if err := unix.Connect(filler, to); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
	}
}

// TestDeadAddresses connects to addresses that are silent.
func TestDeadAddresses(t *testing.T) {
	server := serving(t, func(w http.ResponseWriter, r *http.Request) {})
	at := server.Listener.Addr().(*net.TCPAddr)
	silentAddress(t, "127.0.0.79", at.Port)
	silent := fmt.Sprintf("http://127.0.0.79:%d/nar", at.Port)
	c := client(t, mirror.Options{})
	// One that is given up while it is connected to.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.OpenNar(ctx, silent, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if err := c.Down(silent); err != nil {
		t.Errorf("it rests: %v", err)
	}
	begin, hasty := time.Now(), client(t, mirror.Options{ConnectTimeout: 50 * time.Millisecond})
	if _, err := hasty.OpenNar(t.Context(), silent, false); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("error %v", err)
	}
	if hasty.Down(silent) == nil && time.Since(begin) < time.Second {
		t.Error("it does not rest")
	}
	if err := hasty.Narinfos(t.Context(), fmt.Sprintf("http://127.0.0.78:%d", at.Port), []string{"x"}, mirror.Wanted, nil); err == nil || !strings.Contains(err.Error(), "127.0.0.78") {
		t.Errorf("error %v", err)
	}
}
