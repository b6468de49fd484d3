// SPDX-License-Identifier: GPL-3.0-or-later

package protocol_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

func TestRequests(t *testing.T) {
	input := "have /gnu/store/a /gnu/store/b \n" +
		"info /gnu/store/a\n" +
		"\n" +
		"  \t \n" +
		"substitute  /gnu/store/a\t/gnu/store/b\r\n" +
		"what\n" +
		"last line"
	want := []protocol.Request{
		{"have", []string{"/gnu/store/a", "/gnu/store/b"}},
		{"info", []string{"/gnu/store/a"}},
		{},
		{},
		{"substitute", []string{"/gnu/store/a", "/gnu/store/b"}},
		{"what", nil},
		{"last", []string{"line"}},
	}
	for name, r := range map[string]io.Reader{
		"at once":      strings.NewReader(input),
		"byte by byte": iotest.OneByteReader(strings.NewReader(input)),
	} {
		requests := requestsOf(r)
		for i, w := range want {
			got, err := requests.Next()
			if err != nil || got.Command != w.Command || !slices.Equal(got.Arguments, w.Arguments) {
				t.Errorf("%s: request %d: %q, error %v; want %q", name, i, got, err, w)
			}
		}
		for range 2 {
			if _, err := requests.Next(); err != io.EOF {
				t.Errorf("%s: error %v at the end", name, err)
			}
		}
	}
}

func requestsOf(r io.Reader) *protocol.Requests {
	return protocol.NewLog(io.Discard, protocol.LogStyle{}).Requests(r)
}

func TestTooLongRequest(t *testing.T) {
	zeros, err := os.Open("/dev/zero")
	must(t, err)
	defer zeros.Close()
	requests := requestsOf(io.MultiReader(io.LimitReader(zeros, protocol.MaxRequest+1), strings.NewReader("\nhave x\n")))
	var tooLong *protocol.TooLongError
	if _, err := requests.Next(); !errors.As(err, &tooLong) || tooLong.Length != protocol.MaxRequest+2 {
		t.Errorf("error %v", err)
	}
	if got, err := requests.Next(); err != nil || got.Command != "have" {
		t.Errorf("next request: %q, error %v", got, err)
	}
	failure := errors.New("no")
	requests = requestsOf(iotest.ErrReader(failure))
	if _, err := requests.Next(); err != failure {
		t.Errorf("error %v", err)
	}
}

func TestReplies(t *testing.T) {
	for name, test := range map[string]struct {
		got, want string
	}{
		"have nothing": {protocol.ReplyHave(nil), "\n"},
		"have two":     {protocol.ReplyHave([]string{"/s/a", "/s/b"}), "/s/a\n/s/b\n\n"},
		"info nothing": {protocol.ReplyInfo(nil), "\n"},
		"info two": {protocol.ReplyInfo([]protocol.Info{
			{"/s/a", "/s/d.drv", []string{"/s/c", "/s/a"}, 21, 21064},
			{Path: "/s/b", NarSize: 1<<64 - 1},
		}), "/s/a\n/s/d.drv\n2\n/s/c\n/s/a\n21\n21064\n/s/b\n\n0\n0\n18446744073709551615\n\n"},
		"success":   {protocol.ReplySuccess("sha256:0abc", 1<<63+100), "success sha256:0abc 9223372036854775908\n"},
		"mismatch":  {protocol.ReplyHashMismatch("0a", "0b"), "hash-mismatch sha256 0a 0b\n"},
		"not found": {protocol.ReplyNotFound, "not-found\n"},
	} {
		if test.got != test.want {
			t.Errorf("%s: %q, want %q", name, test.got, test.want)
		}
	}
}

func TestOptions(t *testing.T) {
	for name, test := range map[string]struct {
		packed                string
		urls                  []string
		set                   bool // they are
		traces                bool
		columns               int
		deduplicate, discover bool
	}{
		"of an unprivileged client": {`build-fallback=false
build-max-jobs=1
build-use-substitutes=true
substitute-urls=https://bordeaux.guix.gnu.org https://ci.guix.gnu.org
untrusted-locale=en_US.utf8
untrusted-print-extended-build-trace=1
untrusted-terminal-columns=120
untrusted-user-name=alice
deduplicate=yes`, []string{"https://bordeaux.guix.gnu.org", "https://ci.guix.gnu.org"}, true, true, 119, true, false},
		"odd ones, and an empty list of the client, which is a list": {
			"untrusted-substitute-urls=\nsubstitute-urls=http://a\n\n=x\nno value\nterminal-columns=3\ndeduplicate=no\ndeduplicate=yes\ndiscover=true\nprint-extended-build-trace=0",
			nil, true, false, 20, false, true,
		},
		"none": {"", nil, false, false, 80, false, false},
	} {
		o := protocol.ParseOptions(test.packed)
		if urls, ok := o.SubstituteURLs(); ok != test.set || !slices.Equal(urls, test.urls) {
			t.Errorf("%s: URLs %q, %v", name, urls, ok)
		}
		if o.Traces() != test.traces || o.Columns() != test.columns || o.Deduplicate() != test.deduplicate || o.Discover() != test.discover {
			t.Errorf("%s: traces %v, columns %d, deduplicate %v, discover %v", name, o.Traces(), o.Columns(), o.Deduplicate(), o.Discover())
		}
		if user, ok := o["untrusted-user-name"]; ok != strings.Contains(test.packed, "alice") || ok && user != "alice" {
			t.Errorf("%s: user name %q, %v", name, user, ok)
		}
	}
}

var must = testhelp.Must

// lines is a log that notes each write.
type lines struct{ writes []string }

func (l *lines) Write(p []byte) (int, error) {
	l.writes = append(l.writes, string(p))
	return len(p), nil
}

func TestTraces(t *testing.T) {
	for name, test := range map[string]struct {
		item string
		do   func(d *protocol.Download)
		want string
	}{
		"all": {"/s/c-bar", func(d *protocol.Download) {
			d.From("http://h/nar/c-bar", 20112)
			d.Add(1024)
			d.Add(20112 - 1024)
			d.Finish(true)
		}, `@ download-started /s/c-bar http://h/nar/c-bar 20112
@ download-progress /s/c-bar http://h/nar/c-bar 20112 0
@ download-progress /s/c-bar http://h/nar/c-bar 20112 20112
@ download-succeeded /s/c-bar http://h/nar/c-bar 20112

`},
		"another way, from which clients are told": {"/s/x", func(d *protocol.Download) {
			d.From("http://one/a b\n@ evil", 10)
			d.Add(4)
			d.From("http://two/", -1)
			d.Add(7)
			d.Finish(true)
		}, `@ download-started /s/x http://one/a%20b;%20@%20evil 10
@ download-progress /s/x http://one/a%20b;%20@%20evil 10 0

@ download-started /s/x http://two/ -
@ download-progress /s/x http://two/ - 0
@ download-progress /s/x http://two/ - 7
@ download-succeeded /s/x http://two/ 7

`},
		"not all has been transferred, but it is there": {"/s/y", func(d *protocol.Download) {
			d.From("u", 100)
			d.Add(60)
			d.Finish(true)
		}, `@ download-started /s/y u 100
@ download-progress /s/y u 100 0
@ download-progress /s/y u 100 60
@ download-progress /s/y u 100 100
@ download-succeeded /s/y u 100

`},
		"nothing was started": {"/s/z", func(d *protocol.Download) { d.Finish(false) }, ""},
		"no success": {"/s/z", func(d *protocol.Download) {
			d.From("u", 5)
			d.Finish(false)
		}, "@ download-started /s/z u 5\n@ download-progress /s/z u 5 0\n\n"},
		"clients have drawn nothing": {"/s/z", func(d *protocol.Download) {
			d.From("u", -1)
			d.Finish(false)
		}, "@ download-started /s/z u -\n@ download-progress /s/z u - 0\n"},
		"it appears without anybody asking": {"i", func(d *protocol.Download) {
			d.From("u", 100)
			d.Add(42)
			time.Sleep(time.Second)
			d.Add(1)
			d.Finish(true)
		}, `@ download-started i u 100
@ download-progress i u 100 0
@ download-progress i u 100 42
@ download-progress i u 100 43
@ download-progress i u 100 100
@ download-succeeded i u 100

`},
	} {
		synctest.Test(t, func(t *testing.T) {
			var w lines
			test.do(protocol.NewLog(&w, protocol.LogStyle{Program: "guix substitute", Traces: true, Columns: 80}).Download(test.item))
			if got := strings.Join(w.writes, ""); got != test.want {
				t.Errorf("%s: got %q, want %q", name, got, test.want)
			}
		})
	}
}

// Clients of the daemon draw a line of each progress, which messages stand below.
func TestMessagesBelowProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w lines
		log := protocol.NewLog(&w, protocol.LogStyle{Program: "guix substitute", Traces: true, Columns: 80})
		d := log.Download("i")
		d.From("u", 100)
		d.Add(42)
		time.Sleep(time.Second)
		log.Notef("going on after 42 bytes")
		log.Warnf("cut off")
		d.Add(58)
		d.Finish(true)
		log.Notef("done")
		want := `@ download-started i u 100
@ download-progress i u 100 0
@ download-progress i u 100 42

guix substitute: going on after 42 bytes
guix substitute: warning: cut off
@ download-progress i u 100 100
@ download-succeeded i u 100

guix substitute: done
`
		if got := strings.Join(w.writes, ""); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestProgressForPeople(t *testing.T) { synctest.Test(t, testProgressForPeople) }

func testProgressForPeople(t *testing.T) {
	show := func(style protocol.LogStyle, url string, size, n int64, success bool) string {
		var w lines
		style.Dynamic = true
		d := protocol.NewLog(&w, style).Download("/gnu/store/lnqjid21cvqw4c4kh7xnj2ikp2d0qfnb-hello-1.0")
		d.From(url, size)
		for ; n > 0; n -= 1 << 30 {
			d.Add(int(min(n, 1<<30)))
		}
		d.Finish(success)
		return strings.Join(w.writes, "")
	}
	const url = "http://h/nar/zstd/lnqjid21cvqw4c4kh7xnj2ikp2d0qfnb-hello-1.0"
	for name, test := range map[string]struct{ got, want string }{
		"whole": {show(protocol.LogStyle{Columns: 80}, url, 3<<20, 3<<20, true),
			`^Downloading ` + url + `\.\.\.\n` +
				`\r\x1b\[K hello-1\.0  3\.0MiB +\S+/s 00:00 \[ {18}\]   0\.0%` +
				`\r\x1b\[K hello-1\.0  3\.0MiB +\S+/s 00:00 \[#{18}\] 100\.0%\n\n$`},
		"half": {show(protocol.LogStyle{Columns: 40, Unicode: true}, url, 2000, 1000, true),
			`\r\x1b\[K hello-1\.0  2KiB \S+/s 00:00 ▕█{9} {9}▏  50\.0%\n\n$`},
		"unknown size": {show(protocol.LogStyle{Columns: 80}, url, -1, 100, true),
			`\r\x1b\[K hello-1\.0 +\S+/s 00:00 \| 100B transferred\n\n$`},
		"read capability": {show(protocol.LogStyle{Columns: 80}, "urn:eris:BIAD77QD", 2<<40, 1<<40, true),
			`^Downloading urn:eris:BIAD77QD\.\.\.\n[^$]* hello-1\.0  2\.000TiB +\S+/s 00:00 \[#{9} {9}\]  50\.0%\n\n$`},
	} {
		if !regexp.MustCompile(test.want).MatchString(test.got) {
			t.Errorf("%s: got %q, want %s", name, test.got, test.want)
		}
	}
	// The line is as wide as it may be.
	line := show(protocol.LogStyle{Columns: 77}, url, 100, 100, true)
	line = line[strings.LastIndex(line, "\x1b[K")+3:]
	if got := len(strings.TrimRight(line, "\n")); got != 77 {
		t.Errorf("line of %d characters: %q", got, line)
	}
	// A file gets no line that is drawn over.
	var w lines
	d := protocol.NewLog(&w, protocol.LogStyle{}).Download("i")
	d.From(url, 10)
	d.Finish(true)
	if got := strings.Join(w.writes, ""); got != "Downloading "+url+"...\n" {
		t.Errorf("got %q", got)
	}
}

func TestMessages(t *testing.T) { synctest.Test(t, testMessages) }

func testMessages(t *testing.T) {
	var w lines
	log := protocol.NewLog(&w, protocol.LogStyle{Program: "guix substitute", Dynamic: true, Columns: 80})
	lookup := log.Lookup("http://h", 2)
	lookup.Add(1)
	lookup.Add(1)
	log.Warnf("%s\n@ download-started x", "evil\x1b[2J")
	lookup.End()
	for range 2 {
		log.Lookup("http://h", 1).End() // not shown: neither the first one, nor slow
	}
	slow := log.Lookup("http://h", 1)
	time.Sleep(time.Second)
	slow.Add(1)
	slow.End()
	log.Lookup("http://other", 1).End()
	log.Errorf("bad")
	log.Notef("note")
	for range 3 {
		log.WarnOnce("key", "once")
	}
	want := []string{
		"\r\x1b[Klooking for substitutes on 'http://h'...   0.0%",
		"\n",
		"guix substitute: warning: evil [2J; @ download-started x\n",
		"\r\x1b[Klooking for substitutes on 'http://h'... 100.0%",
		"\n",
		"\r\x1b[Klooking for substitutes on 'http://h'...   0.0%",
		"\r\x1b[Klooking for substitutes on 'http://h'... 100.0%",
		"\n",
		"\r\x1b[Klooking for substitutes on 'http://other'...   0.0%",
		"\n",
		"guix substitute: error: bad\n",
		"guix substitute: note\n",
		"guix substitute: warning: once\n",
	}
	if !slices.Equal(w.writes, want) {
		t.Errorf("got %q, want %q", w.writes, want)
	}
}

// TestLogIsText checks that nothing from outside controls a terminal, is no text where it is shown,
// or makes a line too long for one write.
func TestLogIsText(t *testing.T) {
	const evil = "a\u009b2Jb\x9b\u0085é\x00\x7f\u202e"
	for unicode, want := range map[bool]string{
		false: "g: warning: a 2Jb? ?   \n",
		true:  "g: warning: a 2Jb\ufffd é   \n",
	} {
		var w lines
		protocol.NewLog(&w, protocol.LogStyle{Program: "g", Unicode: unicode}).Warnf("%s", evil)
		if !slices.Equal(w.writes, []string{want}) {
			t.Errorf("got %q, want %q", w.writes, want)
		}
	}
	long := "http://h/" + strings.Repeat("x", 1<<20)
	for _, traces := range []bool{false, true} {
		var w lines
		log := protocol.NewLog(&w, protocol.LogStyle{Traces: traces, Unicode: true, Dynamic: true})
		log.Warnf("%s%s", "é", strings.Repeat("é", 1<<20))
		log.Lookup(long, 3).End()
		d := log.Download("/gnu/store/" + strings.Repeat("y", 1<<20) + "\n@ x")
		d.From(long, 5)
		d.Add(3)
		d.Finish(true)
		for _, line := range w.writes {
			if len(line) > 4096+len("é") || !utf8.ValidString(line) || strings.Contains(line, "\n@") {
				t.Errorf("line of %d bytes: %.50q", len(line), line)
			}
		}
	}
}

// TestBetweenRequests says something while nobody reads: it is shown with the next request, and
// what does not fit is lost.
func TestBetweenRequests(t *testing.T) { synctest.Test(t, testBetweenRequests) }

func testBetweenRequests(t *testing.T) {
	var w lines
	log := protocol.NewLog(&w, protocol.LogStyle{Program: "g", Dynamic: true})
	requests := log.Requests(strings.NewReader("one\ntwo\nthree\n"))
	next := func(want ...string) {
		t.Helper()
		if len(w.writes) > 0 {
			t.Errorf("shown between requests: %q", w.writes)
		}
		if _, err := requests.Next(); err != nil || !slices.Equal(w.writes, want) {
			t.Errorf("shown with the request: %q, want %q (%v)", w.writes, want, err)
		}
		w.writes = nil
	}
	r, pipe, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer pipe.Close()
	reply := func() {
		t.Helper()
		must(t, requests.Reply(int(pipe.Fd()), "reply\n"))
	}
	ahead := log.Hold()
	ahead.WarnOnce("a", "ahead")
	ahead.WarnOnce("b", "ahead")
	ahead.WarnOnce("b", "ahead")
	log.Warnf("early")
	log.WarnOnce("a", "early")
	next("g: warning: early\n", "g: warning: early\n")
	ahead.Release()
	ahead.WarnOnce("b", "late")
	ahead.WarnOnce("c", "late")
	log.WarnOnce("c", "later")
	defer log.Lookup("u", 2).End()
	want := []string{"g: warning: ahead\n", "g: warning: late\n", "\r\x1b[Klooking for substitutes on 'u'...   0.0%"}
	if !slices.Equal(w.writes, want) {
		t.Errorf("shown: %q, want %q", w.writes, want)
	}
	w.writes = nil
	reply()
	if !slices.Equal(w.writes, []string{"\n"}) {
		t.Errorf("a line stays open: %q", w.writes)
	}
	w.writes = nil
	defer log.Lookup("u", 2).End()
	d := log.Download("i")
	d.From("u", 5)
	d.Add(5)
	d.Finish(false)
	next("Downloading u...\n", "\n")
	reply()
	for range 1000 {
		log.Notef("%s", strings.Repeat("x", 1000))
	}
	if len(w.writes) > 0 {
		t.Errorf("%d messages are shown between requests", len(w.writes))
	}
	requests.Next()
	if n := len(w.writes); n < 60 || n > 66 {
		t.Errorf("%d messages are kept", n)
	}
}

// TestWarnOnceForgets checks that what has been said does not fill the memory.
func TestWarnOnceForgets(t *testing.T) {
	var w lines
	log := protocol.NewLog(&w, protocol.LogStyle{})
	for i := range 30_000 {
		log.WarnOnce(fmt.Sprint(i), "warning")
	}
	if len(w.writes) != 10_000 {
		t.Errorf("%d warnings", len(w.writes))
	}
}

// TestStuckLog writes to a pipe that nobody reads: that ends, and the pipe is used again when there
// is room.
func TestStuckLog(t *testing.T) {
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	out := protocol.NewDescriptorWriter(int(w.Fd()))
	line := strings.Repeat("x", 999) + "\n"
	begin := time.Now()
	for range 1000 {
		if n, err := io.WriteString(out, line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	t.Logf("dropped what does not fit after %v", time.Since(begin))
	b := make([]byte, 1<<20)
	if n, err := r.Read(b); err != nil || n < 32<<10 || n > 1<<20 {
		t.Errorf("read %d bytes, error %v", n, err)
	}
	if _, err := io.WriteString(out, "again\n"); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(b); err != nil || string(b[:n]) != "again\n" {
		t.Errorf("read %q, error %v", b[:n], err)
	}
}

func FuzzRequests(f *testing.F) {
	f.Add([]byte("have /gnu/store/a \ninfo\n\nsubstitute a b"))
	f.Add([]byte("\x00\xff\n\r\n\v"))
	f.Fuzz(func(t *testing.T, b []byte) {
		requests := requestsOf(bytes.NewReader(b))
		n := 0
		for {
			request, err := requests.Next()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			n++
			for _, word := range append(request.Arguments, request.Command) {
				if strings.ContainsAny(word, " \t\r\n") {
					t.Errorf("word %q", word)
				}
			}
		}
		want := bytes.Count(b, []byte("\n"))
		if len(b) > 0 && b[len(b)-1] != '\n' {
			want++
		}
		if n != want {
			t.Errorf("%d requests of %d lines", n, want)
		}
	})
}

func FuzzOptions(f *testing.F) {
	f.Add("substitute-urls=a b\nuntrusted-terminal-columns=100\ndeduplicate=yes")
	f.Add("=\n==\nterminal-columns=99999999999999999999\nterminal-columns=-5")
	f.Fuzz(func(t *testing.T, packed string) {
		o := protocol.ParseOptions(packed)
		if c := o.Columns(); c < 20 || c > 1000 {
			t.Errorf("%d columns", c)
		}
		urls, set := o.SubstituteURLs()
		if len(urls) > 0 && !set {
			t.Error("URLs that are not set")
		}
		for _, u := range urls {
			if strings.ContainsAny(u, " \n\t") {
				t.Errorf("URL %q", u)
			}
		}
		o.Traces()
		o.Deduplicate()
		o.Discover()
	})
}
