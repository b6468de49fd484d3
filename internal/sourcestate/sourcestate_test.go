// SPDX-License-Identifier: GPL-3.0-or-later

package sourcestate

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

const url = "coap+tcp://store.example/secret-path"

// want checks what is known of the source.
func want(t *testing.T, s *State, what string, good func(r Record) bool) {
	t.Helper()
	if r := s.Get(url); !good(r) {
		t.Errorf("%s: %+v", what, r)
	}
}

func TestRemembers(t *testing.T) { synctest.Test(t, testRemembers) }

func testRemembers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "sources")
	s := Open(path)
	want(t, s, "unknown", func(r Record) bool { return r == Record{} })
	s.Measured(url, 10<<20, time.Second, 30*time.Millisecond)
	must(t, s.Save())
	time.Sleep(time.Hour)
	want(t, Open(path), "the next process", func(r Record) bool {
		return r.Rate == 10<<20 && r.RoundTrip == 30*time.Millisecond && r.Updated.Equal(time.Now().Add(-time.Hour))
	})
	b, err := os.ReadFile(path)
	if err != nil || bytes.Contains(b, []byte("secret")) || bytes.Contains(b, []byte("example")) {
		t.Errorf("the file shows the URL: %s, %v", b, err)
	}
	time.Sleep(maxSpeedAge)
	want(t, Open(path), "after the age of speeds", func(r Record) bool { return r.Rate == 0 && r.RoundTrip == 0 })
	time.Sleep(maxAge)
	want(t, Open(path), "after the age of records", func(r Record) bool { return r.Updated.IsZero() })
}

func TestMeasured(t *testing.T) { synctest.Test(t, testMeasured) }

func testMeasured(t *testing.T) {
	s := Open("")
	s.Measured(url, 100, time.Microsecond, 0)
	want(t, s, "after 100 bytes", func(r Record) bool { return r.Rate == 0 })
	s.Measured(url, 1e8, time.Second, 20*time.Millisecond)
	s.Measured(url, 2e8, time.Second, 10*time.Millisecond)
	want(t, s, "after two measurements", func(r Record) bool { return r.Rate == 1.5e8 && r.RoundTrip == 10*time.Millisecond })
	s.Measured(url, 1<<16, time.Second, 30*time.Millisecond)
	want(t, s, "after a small one", func(r Record) bool { return r.Rate >= 1.4e8 && r.RoundTrip == 20*time.Millisecond })
	// What is old weighs little, and is then forgotten; but not because nothing else was measured.
	time.Sleep(6 * rateHalfLife)
	s.Measured(url, 4<<20, time.Second, 0)
	want(t, s, "after an old one", func(r Record) bool { return r.Rate <= 1e7 })
	time.Sleep(maxSpeedAge - time.Hour)
	s.Measured(url, 0, 0, time.Millisecond)
	time.Sleep(2 * time.Hour)
	want(t, s, "after a long time", func(r Record) bool { return r.Rate == 0 && r.RoundTrip != 0 })
}

// TestRests has a source that does not answer.
func TestRests(t *testing.T) { synctest.Test(t, testRests) }

func testRests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sources")
	s := Open(path)
	until := time.Now().Add(time.Minute)
	s.Rests(url, until, 3)
	must(t, s.Save())
	s = Open(path)
	want(t, s, "the next process", func(r Record) bool { return r.Rest.Equal(until) && r.Rests == 3 })
	s.Measured(url, 1<<20, time.Second, 0)
	must(t, s.Save())
	want(t, Open(path), "after it has answered", func(r Record) bool { return r.Rest.IsZero() && r.Rests == 0 })
}

// TestProcesses has several states learn at the same time.
func TestProcesses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sources")
	name := func(i, j int) string { return fmt.Sprintf("coap+tcp://%d.%d.example", i, j) }
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			s := Open(path)
			for j := range 5 {
				s.Measured(name(i, j), 1<<20, time.Second, time.Millisecond)
				err := s.Save()
				for errors.Is(err, files.ErrLocked) { // for seconds, where the machine is busy
					err = s.Save()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	s := Open(path)
	for i := range 40 {
		if r := s.Get(name(i/5, i%5)); r.Rate != 1<<20 {
			t.Errorf("source %s was lost: %+v", name(i/5, i%5), r)
		}
	}
}

// TestMerge has two processes learn about one source.
func TestMerge(t *testing.T) { synctest.Test(t, testMerge) }

func testMerge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sources")
	one, two := Open(path), Open(path)
	one.Rests(url, time.Now().Add(time.Hour), 1)
	time.Sleep(time.Minute)
	two.Measured(url, 1e6, time.Second, time.Millisecond)
	must(t, two.Save())
	must(t, one.Save())
	for _, s := range []*State{one, Open(path)} {
		want(t, s, "what either learnt", func(r Record) bool { return r.Rate == 1e6 && r.Rests == 1 })
	}
}

func TestBounds(t *testing.T) { synctest.Test(t, testBounds) }

func testBounds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sources")
	s := Open(path)
	for i := range 5 * maxRecords {
		time.Sleep(time.Second)
		s.Measured(fmt.Sprint(i), 1<<20, time.Second, time.Millisecond)
	}
	must(t, s.Save())
	info, err := os.Stat(path)
	if err != nil || info.Size() > maxFile {
		t.Fatalf("the file has %d bytes: %v", info.Size(), err)
	}
	s = Open(path)
	if len(s.known.Sources) != maxRecords || s.Get(fmt.Sprint(5*maxRecords-1)).Rate == 0 {
		t.Errorf("%d records, and the last is %+v", len(s.known.Sources), s.Get(fmt.Sprint(5*maxRecords-1)))
	}
}

func TestBadFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sources")
	k := key(url)
	for name, text := range map[string]string{
		"empty":     "",
		"cut":       `{"version":2,"sources":{"` + k + `":{"rate":1`,
		"version":   `{"version":1,"sources":{"` + k + `":{"rate":1,"updated":"1999-12-24T03:06:40Z"}}}`,
		"rate":      `{"version":2,"sources":{"` + k + `":{"rate":-1,"updated":"1999-12-24T03:06:40Z"}}}`,
		"huge":      `{"version":2,"sources":{"` + k + `":{"rate":1e300,"updated":"1999-12-24T03:06:40Z"}}}`,
		"future":    `{"version":2,"sources":{"` + k + `":{"rate":1,"updated":"2279-10-26T00:00:00Z"}}}`,
		"rests":     `{"version":2,"sources":{"` + k + `":{"rest":"2000-12-24T03:06:40Z","rests":9,"updated":"1999-12-24T03:06:40Z"}}}`,
		"oversized": `{"version":2,"sources":{"` + k + `":{"rate":1,"updated":"1999-12-24T03:06:40Z"}}}` + strings.Repeat(" ", maxFile),
		"array":     `[]`,
	} {
		synctest.Test(t, func(t *testing.T) { // which begins with the year 2000
			must(t, os.WriteFile(path, []byte(text), 0o644))
			s := Open(path)
			want(t, s, name, func(r Record) bool { return r == Record{} })
			s.Measured(url, 1<<20, time.Second, 0)
			must(t, s.Save())
			want(t, Open(path), name+", replaced", func(r Record) bool { return r.Rate == 1<<20 })
		})
	}
	good := `{"version":2,"sources":{"` + k + `":{"rate":1,"measured":"1999-12-24T03:06:40Z","updated":"1999-12-24T03:06:40Z"}}}`
	synctest.Test(t, func(t *testing.T) {
		if r := parse([]byte(good)).Sources[k]; r.Rate != 1 {
			t.Errorf("a good file is not read: %+v", r)
		}
	})
}

func TestSaveFails(t *testing.T) {
	d := t.TempDir()
	s := Open(filepath.Join(d, "file", "sources"))
	must(t, os.WriteFile(filepath.Join(d, "file"), nil, 0o644))
	s.Measured(url, 1<<20, time.Second, 0)
	if err := s.Save(); err == nil {
		t.Error("Save into a file as a directory succeeded")
	}
	want(t, s, "not written", func(r Record) bool { return r.Rate != 0 })
}

func FuzzParse(f *testing.F) {
	now := time.Now().UTC().Format(time.RFC3339)
	f.Add([]byte(`{"version":2,"sources":{"` + key(url) + `":{"rate":1,"round_trip":5,"rest":"` + now + `","rests":2,"measured":"` + now + `","updated":"` + now + `"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for k, r := range parse(b).Sources {
			r = r.aged(time.Now())
			if len(k) != 32 || !(r.Rate >= 0 && r.Rate < 1e12) || r.RoundTrip < 0 || r.RoundTrip > time.Minute {
				t.Errorf("record %+v", r)
			}
		}
	})
}

// TestAhead has several processes count, one of which has nothing else to write down, and a file
// with numbers that make no sense.
func TestAhead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if a := ReadAhead(path); a != (Ahead{}) {
		t.Errorf("no file counts %+v", a)
	}
	nothing := Open(path)
	nothing.CountAhead(Ahead{})
	must(t, nothing.Save())
	if _, err := os.Stat(path); err == nil {
		t.Error("nothing was counted and is written down")
	}
	begin := time.Now().Add(-time.Second)
	for range 3 {
		s := Open(path)
		s.CountAhead(Ahead{Staged: 3, StagedBytes: 300, Used: 2, UsedBytes: 200})
		for range 2 { // what is written down is not written again
			must(t, s.Save())
		}
	}
	other := Open(path)
	other.Measured("x", 1<<20, time.Second, time.Millisecond)
	must(t, other.Save())
	a := ReadAhead(path)
	if a.Since.Before(begin) || a.Since.After(time.Now()) {
		t.Errorf("since %v", a.Since)
	}
	if a.Since = (time.Time{}); a != (Ahead{Staged: 9, StagedBytes: 900, Used: 6, UsedBytes: 600}) {
		t.Errorf("counted %+v", a)
	}
	for _, nonsense := range []string{`"staged":-5`, `"used_bytes":9223372036854775807`, `"since":"9999-01-01T00:00:00Z"`} {
		text := `{"version":2,"sources":{},"ahead":{"used":1,` + nonsense + `}}`
		if a := parse([]byte(text)).Ahead; a != (Ahead{}) {
			t.Errorf("%s counts %+v", nonsense, a)
		}
	}
}
