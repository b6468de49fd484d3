// SPDX-License-Identifier: GPL-3.0-or-later

package status_test

import (
	"errors"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serverlog"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/status"
)

// get asks a server of status as a client of this machine does.
func get(s *status.Server, path string) string {
	w := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "http://localhost:8183"+path, nil)
	r.RemoteAddr = "127.0.0.1:1234"
	s.ServeHTTP(w, r)
	return w.Result().Status + "\n" + w.Body.String()
}

func newServer(collect func() []status.Section) *status.Server {
	return &status.Server{
		Title: "A <server>", Collect: collect, Healthy: func() error { return nil },
		Warnings: func() []serverlog.Warning { return nil },
	}
}

// TestRates checks that the page shows by how much counters grew in each of the last 60 minutes.
func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var counter atomic.Int64
		s := newServer(func() []status.Section {
			return []status.Section{{Title: "T", Figures: []status.Figure{
				{Text: "things", Name: "things_total", Value: float64(counter.Load())}, {Text: "gauge", Name: "gauge", Value: 7},
			}}}
		})
		done, ended := make(chan struct{}), make(chan struct{})
		counter.Store(100)
		go func() { defer close(ended); s.Run(done) }()
		synctest.Wait()
		time.Sleep(time.Second)
		counter.Add(10)
		time.Sleep(2 * time.Minute)
		counter.Add(20)
		page := get(s, "/")
		for _, want := range []string{
			`at most 20 per minute`, `<rect x="354" y="0" width="5" height="32"/>`, `<rect x="342" y="16" width="5" height="16"/>`,
			"<h1>A &lt;server&gt;</h1>", "<tr><th>things</th><td>130</td>",
		} {
			if !strings.Contains(page, want) {
				t.Errorf("the page has no %q: %s", want, page)
			}
		}
		if n := strings.Count(page, "<svg"); n != 1 {
			t.Errorf("%d graphs, for one counter", n)
		}
		time.Sleep(2 * time.Hour)
		if page := get(s, "/"); strings.Contains(page, "<rect") {
			t.Errorf("the last hour has what was before: %s", page)
		}
		close(done)
		<-ended
	})
}

// TestHostile checks what strangers may have put into names.
func TestHostile(t *testing.T) {
	s := newServer(func() []status.Section {
		return []status.Section{{
			Title: "<script>alert(1)</script>", Error: "<b>\x1b[31m",
			Figures: []status.Figure{{Text: "x", Name: "x", Label: "a\"} 1\nevil 2\\", Value: 1}, {Text: "x", Name: "x", Label: "b", Value: 2.5}},
		}}
	})
	if page := get(s, "/"); strings.Contains(page, "<script") || strings.Contains(page, "<b>") || strings.Contains(page, "\x1b") {
		t.Errorf("the page has what strangers want: %s", page)
	}
	want := "200 OK\n# HELP guix_substitute_eris_x x\n# TYPE guix_substitute_eris_x gauge\n" +
		`guix_substitute_eris_x{of="a\"} 1\nevil 2\\"} 1` + "\n" + `guix_substitute_eris_x{of="b"} 2.5` + "\n"
	if got := get(s, "/metrics"); got != want {
		t.Errorf("metrics are %q, want %q", got, want)
	}
}

func TestHealth(t *testing.T) {
	s := newServer(func() []status.Section { return nil })
	if got := get(s, "/healthz"); got != "200 OK\nok\n" {
		t.Errorf("well: %q", got)
	}
	s.Healthy = func() error { return errors.New("the disk fails") }
	if got := get(s, "/healthz"); got != "503 Service Unavailable\nthe disk fails\n" {
		t.Errorf("not well: %q", got)
	}
}

// TestOnThisMachine checks who sees the status: no page of a stranger that has its own name lead
// here, and nobody for whom a proxy asks.
func TestOnThisMachine(t *testing.T) {
	for _, v := range []struct {
		host, remote, header string
		want                 bool
	}{
		{"127.0.0.1:8183", "127.0.0.1:5", "", true},
		{"localhost", "127.0.0.1:5", "", true},
		{"LOCALHOST:1", "[::1]:5", "", true},
		{"[::1]:8183", "[::1]:5", "", true},
		{"[::1]", "[::1]:5", "", true},
		{"rebound.example:8183", "127.0.0.1:5", "", false},
		{"localhost.example", "127.0.0.1:5", "", false},
		{"127.0.0.1.example", "127.0.0.1:5", "", false},
		{"", "127.0.0.1:5", "", false},
		{"192.0.2.1", "127.0.0.1:5", "", false},
		{"localhost", "192.0.2.1:5", "", false},
		{"localhost", "", "", false},
		{"localhost", "127.0.0.1:5", "X-Forwarded-For", false},
		{"localhost", "127.0.0.1:5", "Via", false},
		{"127.0.0.1:8080", "127.0.0.1:5", "HTTP/1.0", false},
	} {
		r := httptest.NewRequest("GET", "http://x/", nil)
		r.Host, r.RemoteAddr = v.host, v.remote
		if v.header == "HTTP/1.0" {
			r.ProtoMinor = 0
		} else if v.header != "" {
			r.Header.Set(v.header, "192.0.2.1")
		}
		if got := status.OnThisMachine(r); got != v.want {
			t.Errorf("%+v: %v", v, got)
		}
		w := httptest.NewRecorder()
		newServer(func() []status.Section { return nil }).ServeHTTP(w, r)
		if (w.Code == 200) != v.want {
			t.Errorf("%+v: status %d", v, w.Code)
		}
	}
}
