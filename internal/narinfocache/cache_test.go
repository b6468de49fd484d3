// SPDX-License-Identifier: GPL-3.0-or-later

package narinfocache

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

const url = "http://127.0.0.1:8765/sub"

var (
	hash = strings.Repeat("a", 32)
	now  = time.Unix(1_800_000_000, 0)
)

func open(t testing.TB, directory string) *Cache {
	t.Helper()
	c, err := Open(directory)
	must(t, err)
	return c
}

// entries returns the files of a cache that are entries.
func entries(t testing.TB, directory string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(directory, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found = append(found, path)
		}
		return err
	})
	must(t, err)
	return found
}

func TestCache(t *testing.T) {
	d := t.TempDir() + "/a/b"
	c := open(t, d)
	if _, ok := c.Get(url, hash, now); ok {
		t.Error("there is an entry in an empty cache")
	}
	for _, e := range []Entry{
		{Narinfo: []byte("StorePath: x\n"), TTL: time.Hour},
		{Narinfo: bytes.Repeat([]byte("long "), 100000), TTL: time.Hour},
		{Narinfo: []byte{}, TTL: time.Hour},
		{TTL: time.Minute},
	} {
		must(t, c.put(url, hash, e, now))
		for _, c := range []*Cache{c, open(t, d)} {
			got, ok := c.Get(url, hash, now.Add(e.TTL))
			if !ok || !bytes.Equal(got.Narinfo, e.Narinfo) || got.TTL != e.TTL || (got.Narinfo == nil) != (e.Narinfo == nil) {
				t.Errorf("got %.50q, TTL %v, %v; want %.50q, TTL %v", got.Narinfo, got.TTL, ok, e.Narinfo, e.TTL)
			}
			if _, ok := c.Get(url, hash, now.Add(e.TTL+time.Second)); ok {
				t.Error("an entry outlives its TTL")
			}
			if _, ok := c.Get(url, hash, now.Add(-time.Hour)); ok {
				t.Error("an entry from the future is valid")
			}
		}
	}
	if _, ok := c.Get(url+"/", hash, now); ok {
		t.Error("an entry is that of another server")
	}
	if _, ok := c.Get(url, strings.Repeat("b", 32), now); ok {
		t.Error("an entry is that of another item")
	}
	for _, bad := range []string{"", "short", "../../" + hash[6:], strings.Repeat("A", 32)} {
		if err := c.put(url, bad, Entry{}, now); err == nil {
			t.Errorf("an entry is stored under the name %q", bad)
		}
		if _, ok := c.Get(url, bad, now); ok {
			t.Errorf("there is an entry named %q", bad)
		}
	}
	if got := entries(t, d); len(got) != 1 {
		t.Errorf("files %q", got)
	}
}

func TestPutLater(t *testing.T) {
	d := t.TempDir()
	c := open(t, d)
	const n = 200
	text := func(i int) string { return strings.Repeat("x", i*1000) }
	for i := range n {
		// Twice, the second time with what counts.
		for _, narinfo := range []string{"old", text(i)} {
			must(t, c.PutLater(url, fmt.Sprintf("%032d", i), Entry{Narinfo: []byte(narinfo), TTL: time.Hour}, now.Add(time.Duration(len(narinfo)))))
		}
	}
	check := func(c *Cache) {
		t.Helper()
		for i := range n {
			if e, ok := c.Get(url, fmt.Sprintf("%032d", i), now); !ok || string(e.Narinfo) != text(i) {
				t.Errorf("entry %d: %v, %d bytes", i, ok, len(e.Narinfo))
			}
		}
	}
	check(c)
	c.Close()
	check(c)
	check(open(t, d))
	if _, ok := c.Get(url, hash, now.Add(2*time.Hour)); ok {
		t.Error("an entry outlives its TTL")
	}

	// What goes wrong later is told later.
	os.RemoveAll(d)
	must(t, os.WriteFile(d, nil, 0o644))
	must(t, c.PutLater(url, hash, Entry{}, now))
	c.Close()
	if err := c.PutLater(url, hash, Entry{}, now); err == nil {
		t.Error("an entry cannot be written, and nothing says so")
	}
	c.Close()
}

// TestCorrupt checks that a file that is damaged in any byte or cut anywhere is no entry.
func TestCorrupt(t *testing.T) {
	d := t.TempDir()
	c := open(t, d)
	must(t, c.put(url, hash, Entry{Narinfo: []byte("StorePath: x\n"), TTL: time.Hour}, now))
	name := entries(t, d)[0]
	good, err := os.ReadFile(name)
	must(t, err)
	check := func(what string, b []byte) {
		t.Helper()
		must(t, os.WriteFile(name, b, 0o600))
		if e, ok := c.Get(url, hash, now); ok {
			t.Errorf("%s: entry %q", what, e.Narinfo)
		}
	}
	for i := range good {
		check(fmt.Sprintf("cut at %d", i), good[:i])
		damaged := bytes.Clone(good)
		damaged[i] ^= 0x10
		check(fmt.Sprintf("damaged at %d", i), damaged)
	}
	check("zeros", make([]byte, len(good)))
	check("longer", append(bytes.Clone(good), 0))
	must(t, os.Remove(name))
	must(t, os.MkdirAll(name+"/x", 0o755))
	if _, ok := c.Get(url, hash, now); ok {
		t.Error("a directory is an entry")
	}
	if err := c.put(url, hash, Entry{}, now); err == nil {
		t.Error("a directory is replaced by an entry")
	}
}

func TestTrimOld(t *testing.T) {
	d := t.TempDir()
	c := open(t, d)
	start := time.Now()
	for i, ttl := range []time.Duration{time.Second, time.Minute, 24 * time.Hour, 1000 * time.Hour} {
		h := fmt.Sprintf("%032d", i)
		must(t, c.put(url, h, Entry{Narinfo: []byte("x"), TTL: ttl}, start))
		must(t, c.put("http://other", h, Entry{TTL: time.Second}, start))
	}
	server := filepath.Dir(entries(t, d)[0])
	for _, junk := range []string{".new-123", strings.Repeat("z", 32)} {
		must(t, os.WriteFile(server+"/"+junk, []byte("junk"), 0o600))
	}
	c.trim(start)
	if got := len(entries(t, d)); got != 10 {
		t.Errorf("%d files are left of what is new", got)
	}
	c.trim(start.Add(3 * 24 * time.Hour))
	if got := entries(t, d); len(got) != 0 {
		t.Errorf("old files are left: %q", got)
	}
	must(t, c.put(url, hash, Entry{TTL: time.Hour}, now))
}

// TestTrim checks that the cache does not grow without end, and that what is used stays.
func TestTrim(t *testing.T) {
	d := t.TempDir()
	c := open(t, d)
	const most = 1 << 20
	c.most, c.trimEvery = most, 1
	name := func(i int) string { return fmt.Sprintf("%032d", i) }
	for i := range 300 { // 8 KiB on disk each
		must(t, c.put(url, name(i), Entry{Narinfo: make([]byte, 5000), TTL: time.Hour}, time.Now()))
	}
	// Stored a day ago, and some of them read since.
	day := time.Now().Add(-24 * time.Hour)
	for i, path := range entries(t, d) {
		read := day
		if i < 50 {
			read = time.Now().Add(-2 * time.Hour)
		}
		must(t, os.Chtimes(path, read, day))
	}
	for i := range 20 {
		must(t, c.PutLater(url, name(1000+i), Entry{TTL: time.Hour}, time.Now()))
	}
	c.Close()
	left := func(from, to int) (n int) {
		for i := from; i < to; i++ {
			if _, ok := c.Get(url, name(i), time.Now().Add(-time.Minute)); ok {
				n++
			}
		}
		return n
	}
	if used, unused, fresh := left(0, 50), left(50, 300), left(1000, 1020); used != 50 || fresh != 20 || unused > (most-50*8192)/8192 {
		t.Errorf("left are %d of 50 entries that were used, %d new ones, and %d others", used, fresh, unused)
	}
}

// TestUnfit checks that nothing is read or written through what others might have put there.
func TestUnfit(t *testing.T) {
	d := t.TempDir()
	c := open(t, d)
	entry := Entry{Narinfo: []byte("x"), TTL: time.Hour}
	must(t, c.put(url, hash, entry, now))
	path := entries(t, d)[0]
	for _, checked := range []string{path, filepath.Dir(path), d} {
		info, err := os.Stat(checked)
		if err != nil || info.Mode().Perm()&0o077 != 0 && checked != d {
			t.Errorf("%s: mode %v, error %v", checked, info.Mode(), err)
		}
	}
	victim := filepath.Join(t.TempDir(), "victim")
	must(t, os.Rename(path, victim))
	precious, err := os.ReadFile(victim)
	must(t, err)
	for name, make := range map[string]func() error{
		"link": func() error { return os.Symlink(victim, path) },
		"pipe": func() error { return syscall.Mkfifo(path, 0o600) },
	} {
		must(t, make())
		if _, ok := c.Get(url, hash, now); ok {
			t.Errorf("an entry is read from a %s", name)
		}
		must(t, c.put(url, hash, entry, now))
		if _, ok := c.Get(url, hash, now); !ok {
			t.Errorf("an entry does not take the place of a %s", name)
		}
		os.Remove(path)
	}
	must(t, os.Symlink(filepath.Dir(victim), filepath.Join(d, "server")))
	c.trim(time.Now().Add(100 * 24 * time.Hour))
	if b, err := os.ReadFile(victim); err != nil || !bytes.Equal(b, precious) {
		t.Errorf("what a link names has changed: %q, error %v", b, err)
	}
	if os.Geteuid() == 0 {
		must(t, os.Chown(d, 1234, -1))
		if _, err := Open(d); err == nil {
			t.Error("the cache of another user is used")
		}
	}
}

// TestManyProcesses has processes write and read the same entries, some of which are killed.
func TestManyProcesses(t *testing.T) {
	if d := os.Getenv("CACHE_DIRECTORY"); d != "" {
		c := open(t, d)
		for i := range 100000 {
			h := fmt.Sprintf("%032d", i%50)
			text := strings.Repeat(h, i%300)
			must(t, c.put(url, h, Entry{Narinfo: []byte(text), TTL: time.Hour}, now))
			h = fmt.Sprintf("%032d", i*7%50)
			if e, ok := c.Get(url, h, now); ok && strings.ReplaceAll(string(e.Narinfo), h, "") != "" {
				fmt.Printf("WRONG entry %q of %s\n", e.Narinfo, h)
			}
		}
		return
	}
	d := t.TempDir()
	var processes []*exec.Cmd
	var outputs []*bytes.Buffer
	for range 4 {
		p := exec.Command(os.Args[0], "-test.run=TestManyProcesses")
		p.Env = append(os.Environ(), "CACHE_DIRECTORY="+d)
		out := &bytes.Buffer{}
		p.Stdout, p.Stderr = out, out
		must(t, p.Start())
		processes = append(processes, p)
		outputs = append(outputs, out)
	}
	c := open(t, d)
	for begun := false; !begun; time.Sleep(300 * time.Millisecond) {
		_, begun = c.Get(url, fmt.Sprintf("%032d", 7), now)
	}
	for _, p := range processes {
		p.Process.Kill()
	}
	for i, p := range processes {
		p.Wait()
		if s := outputs[i].String(); strings.Contains(s, "WRONG") || strings.Contains(s, "FAIL") {
			t.Error(s)
		}
	}
	good := 0
	for i := range 50 {
		if _, ok := c.Get(url, fmt.Sprintf("%032d", i), now); ok {
			good++
		}
	}
	if good == 0 {
		t.Error("nothing was stored")
	}
}

func FuzzDecode(f *testing.F) {
	d := f.TempDir()
	c := open(f, d)
	must(f, c.put(url, hash, Entry{Narinfo: []byte("x"), TTL: time.Hour}, now))
	name := entries(f, d)[0]
	good, err := os.ReadFile(name)
	must(f, err)
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		// Cleaning removes a directory that is empty.
		must(t, os.MkdirAll(filepath.Dir(name), 0o700))
		must(t, os.WriteFile(name, b, 0o600))
		if e, ok := c.Get(url, hash, now); ok && e.TTL < 0 {
			t.Errorf("entry %+v", e)
		}
		c.trim(now.Add(1000 * time.Hour))
	})
}

func BenchmarkGet(b *testing.B) {
	c := open(b, b.TempDir())
	must(b, c.put(url, hash, Entry{Narinfo: make([]byte, 1500), TTL: time.Hour}, now))
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := c.Get(url, hash, now); !ok {
			b.Fatal("no entry")
		}
	}
}

func BenchmarkPut(b *testing.B) {
	c := open(b, b.TempDir())
	for b.Loop() {
		must(b, c.put(url, hash, Entry{Narinfo: make([]byte, 1500), TTL: time.Hour}, now))
	}
}
