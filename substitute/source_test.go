// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

var must = testhelp.Must

// A sharedBuffer is a log that can be looked at.
type sharedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *sharedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *sharedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// warned fails the test if there was a warning.
func (b *sharedBuffer) warned(t *testing.T) {
	t.Helper()
	if strings.Contains(b.String(), "warning") {
		t.Errorf("a warning:\n%s", b)
	}
}

// withLog returns a substituter and what it shows.
func withLog(t testing.TB, key *acl.SigningKey, urls ...string) (*substitute.Substituter, *sharedBuffer) {
	return withOptions(t, mirror.Options{NarinfoTimeout: time.Minute, NarTimeout: time.Minute}, key, urls...)
}

func withOptions(t testing.TB, o mirror.Options, key *acl.SigningKey, urls ...string) (*substitute.Substituter, *sharedBuffer) {
	mirrors := mirror.NewClient(o)
	t.Cleanup(mirrors.Close)
	log := &sharedBuffer{}
	return substitute.New(substitute.Config{
		StoreDir: "/gnu/store",
		URLs:     urls,
		Keys:     acl.NewACL(key.PublicKey()),
		Mirrors:  mirrors,
		Log:      protocol.NewLog(log, protocol.LogStyle{Program: "test", Dynamic: true, Columns: 80}),
	}), log
}

// TestPasswordsNotShown checks that no message shows the user information of a server's URL.
func TestPasswordsNotShown(t *testing.T) {
	key := acl.GenerateSigningKey()
	server := newTestServer(t)
	server.has(itemPath(0), sign(t, key, itemPath(0), 100)) // the nar is 404
	server.has(itemPath(1), "nonsense")
	with := func(address string) string {
		return "http://alice:s3cret@" + strings.TrimPrefix(address, "http://")
	}
	s, log := withLog(t, key, with(server.url), with(testhelp.FreeAddress()), "http://alice:s3cret@host:port")
	s.Debug = true
	s.Info(context.Background(), itemPaths(3))
	s.Substitute(context.Background(), itemPath(0), t.TempDir()+"/item")
	if text := log.String(); strings.Contains(text, "s3cret") || strings.Contains(text, "alice") || !strings.Contains(text, server.url) {
		t.Errorf("shown: %s", text)
	}
}

// A testNetwork has servers, in a bubble in which time goes on while everybody waits.
type testNetwork struct {
	sourcetest.Network
	t *testing.T
}

// bubble runs a test in a bubble.
func bubble(t *testing.T, test func(t *testing.T, n *testNetwork)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, &testNetwork{t: t}) })
}

// serve starts a server and returns its URL.
func (n *testNetwork) serve(h http.HandlerFunc) string {
	l := n.Listen()
	server := &http.Server{Handler: h}
	go server.Serve(l)
	n.t.Cleanup(func() { server.Close() })
	return "http://" + l.Addr().String()
}

// with is [withLog] in the network.
func (n *testNetwork) with(key *acl.SigningKey, urls ...string) (*substitute.Substituter, *sharedBuffer) {
	return withOptions(n.t, mirror.Options{Dial: n.Dial}, key, urls...)
}

// TestDeadServerSaidOnce restores items whose nars are at a server that is dead.
func TestDeadServerSaidOnce(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		texts := map[string]string{}
		for _, path := range itemPaths(5) {
			text := sign(t, key, path, 100)
			texts["/"+filepath.Base(path)[:32]+".narinfo"] = strings.Replace(text, "URL: nar", "URL: http://192.0.2.99/nar", 1)
		}
		s, log := n.with(key, n.serve(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, texts[r.URL.Path]) }))
		for _, path := range itemPaths(5) {
			if o := s.Substitute(t.Context(), path, t.TempDir()+"/item"); o.Status != substitute.NotFound {
				t.Errorf("outcome %+v", o)
			}
		}
		if n := strings.Count(log.String(), "nobody listens"); n != 1 {
			t.Errorf("%d messages about the dead server in: %s", n, log)
		}
	})
}

// TestServerReturns has a server that has answered break connections for a while, or be silent, and
// then for good: it is waited for, but not for ever.
func TestServerReturns(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		var away atomic.Int64 // until when connections break, in nanoseconds
		var silent atomic.Bool
		leave := func(d time.Duration) { away.Store(time.Now().Add(d).UnixNano()) }
		texts := map[string]string{}
		for _, path := range itemPaths(60) {
			texts["/"+filepath.Base(path)[:32]+".narinfo"] = sign(t, key, path, 100)
		}
		s, _ := n.with(key, n.serve(func(w http.ResponseWriter, r *http.Request) {
			if left := time.Until(time.Unix(0, away.Load())); left > 0 {
				if silent.Load() {
					<-r.Context().Done()
				}
				panic(http.ErrAbortHandler)
			}
			io.WriteString(w, texts[r.URL.Path])
		}))
		leave(time.Second)
		if len(s.Info(t.Context(), itemPaths(60)[24:25])) != 1 {
			t.Error("not found at a server that broke the first connections")
		}
		for i := range 20 {
			leave(time.Duration(i) * 140 * time.Millisecond)
			if len(s.Info(t.Context(), itemPaths(60)[i:i+1])) != 1 {
				t.Errorf("not found after an outage of %d ms", i*140)
			}
		}
		leave(time.Second)
		if got := len(s.Info(t.Context(), itemPaths(60)[25:50])); got != 25 {
			t.Errorf("%d of 25 are found", got)
		}
		for _, most := range []time.Duration{15 * time.Second, 90 * time.Second} {
			leave(time.Hour)
			begin := time.Now()
			for i := 50; i < 60; i++ {
				s.Info(t.Context(), itemPaths(60)[i:i+1])
			}
			if took := time.Since(begin); took > most {
				t.Errorf("a server that stays away was waited for for %v", took)
			}
			silent.Store(true)
			leave(0)
			time.Sleep(time.Minute) // its rest
			for i, wait := range []time.Duration{0, 12, 20} {
				leave(wait * time.Second)
				if len(s.Info(t.Context(), itemPaths(60)[20+i:21+i])) != 1 {
					t.Errorf("not found after it was silent for %d s", wait)
				}
			}
		}
	})
}

// TestLineComesAndGoes asks for the first time over a line that is there for two of five seconds,
// while something in between takes connections and breaks them: what is there is found.
func TestLineComesAndGoes(t *testing.T) {
	key := acl.GenerateSigningKey()
	for start := range 20 {
		bubble(t, func(t *testing.T, n *testNetwork) {
			begin := time.Now().Add(-time.Duration(start) * 250 * time.Millisecond)
			s, log := n.with(key, n.serve(func(w http.ResponseWriter, _ *http.Request) {
				if time.Since(begin)%(5*time.Second) >= 2*time.Second {
					panic(http.ErrAbortHandler)
				}
				io.WriteString(w, sign(t, key, itemPath(0), 100))
			}))
			if len(s.Info(t.Context(), itemPaths(1))) != 1 {
				t.Errorf("not found from %d ms of the period: %s", start*250, log)
			}
		})
	}
}

// TestSharedLine restores an item over a line that is so slow that together with another item it
// takes minutes.
func TestSharedLine(t *testing.T) {
	f := newFixture(t, 50_000)
	bubble(t, func(t *testing.T, n *testNetwork) {
		s, log := n.with(f.key, n.serve(f.handler(f.narinfo(t, "none nar"), func(w http.ResponseWriter, r *http.Request) {
			for rest := f.archive; len(rest) > 0; rest = rest[min(500, len(rest)):] {
				if _, err := w.Write(rest[:min(500, len(rest))]); err != nil {
					return
				}
				w.(http.Flusher).Flush()
				time.Sleep(900 * time.Millisecond)
			}
		})))
		var ahead sync.WaitGroup
		ahead.Go(func() {
			if o := s.Prepare(itemPath(0), filepath.Join(t.TempDir(), "other")).Run(t.Context()); o.Status != substitute.Success {
				t.Errorf("outcome %+v of the other item", o)
			}
		})
		f.restore(t, s, substitute.Success, log)
		ahead.Wait()
	})
}

// TestLocalFileFromNetwork checks that a narinfo from a network cannot have a file of ours opened,
// while one of a directory can.
func TestLocalFileFromNetwork(t *testing.T) {
	key := acl.GenerateSigningKey()
	server := newTestServer(t)
	d := t.TempDir()
	text := strings.Replace(sign(t, key, itemPath(0), 100), "URL: nar", "URL: file://"+d+"/nar", 1)
	must(t, os.WriteFile(filepath.Join(d, "nar"), []byte("a secret"), 0o600))
	must(t, os.WriteFile(filepath.Join(d, filepath.Base(itemPath(0))[:32]+".narinfo"), []byte(text), 0o644))
	server.has(itemPath(0), text)
	for url, want := range map[string]string{server.url: "names a local file", "file://" + d: "Downloading file:" + d + "/nar"} {
		s, log := withLog(t, key, url)
		s.Substitute(context.Background(), itemPath(0), t.TempDir()+"/item")
		if !strings.Contains(log.String(), want) || want == "names a local file" && strings.Contains(log.String(), "Downloading") {
			t.Errorf("%s: %s", url, log)
		}
	}
}

// TestStrangers has a stranger name servers, which lead to what only this machine can reach:
// nothing of that is shown.
func TestStrangers(t *testing.T) {
	key := acl.GenerateSigningKey()
	hidden, server := newTestServer(t), newTestServer(t)
	hidden.has(itemPath(0), "a secret")
	hidden.texts["/nar"] = "\r\x00\x00\x00\x00\x00\x00\x00a secret text\x00\x00\x00"
	server.has(itemPath(0), strings.Replace(sign(t, key, itemPath(0), 100), "URL: nar", "URL: "+hidden.url+"/nar", 1))
	for _, stranger := range []bool{false, true} {
		s, log := withLog(t, key, hidden.url, server.url)
		s.Strangers = stranger
		s.Substitute(context.Background(), itemPath(0), t.TempDir()+"/item")
		if n := strings.Count(log.String(), "secret"); stranger != (n == 0) {
			t.Errorf("stranger %t: shown: %s", stranger, log)
		}
		if n := strings.Count(log.String(), "other contents than it should"); stranger != (n > 0) {
			t.Errorf("stranger %t: shown: %s", stranger, log)
		}
	}
}

// TestEndlessNarinfos asks a server whose narinfos are as long as may be: it is not listened to for
// ever, nor asked again, and what it does not say another one says.
func TestEndlessNarinfos(t *testing.T) {
	bubble(t, func(t *testing.T, n *testNetwork) {
		key := acl.GenerateSigningKey()
		endless, good := n.testServer(), n.testServer()
		const items = 60
		for _, path := range itemPaths(items) {
			good.has(path, sign(t, key, path, 100))
			endless.has(path, sign(t, key, path, 100)+"Padding: "+strings.Repeat("x", 900<<10)+"\n")
		}
		s, log := n.with(key, endless.url, good.url)
		available(t, s, itemPaths(items), items)
		// 4 MiB and 8 KiB per item are 5 such narinfos.
		if asked := good.asked.Load(); asked < items-6 || asked == items {
			t.Errorf("the other server was asked for %d of %d items", asked, items)
		}
		alone, _ := n.with(key, endless.url)
		begin := time.Now()
		alone.Have(t.Context(), itemPaths(items))
		if took := time.Since(begin); took > 100*time.Millisecond {
			t.Errorf("alone, it holds a question up for %v", took)
		}
		if text := log.String(); strings.Count(text, "more than narinfos can be") != 1 {
			t.Errorf("shown: %s", text)
		}
	})
}
