// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

var must = testhelp.Must

const killedVariable = "ITEMS_TEST_TABLE"

// TestMain is also the process that is killed.
func TestMain(m *testing.M) {
	directory := os.Getenv(killedVariable)
	if directory == "" {
		os.Exit(m.Run())
	}
	table, err := Open(directory, os.Args[1], func(string, ...any) {})
	for n := 1; err == nil; n++ {
		names := make([]string, n)
		for i := range names {
			names[i] = fmt.Sprint("item", i)
		}
		err = table.Update(context.Background(), names)
		fmt.Println(n)
	}
	panic(err)
}

// random returns bytes that are always the same.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

func write(t testing.TB, path string, contents []byte) {
	t.Helper()
	must(t, errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, contents, 0o644)))
}

// makeStore makes store items of all kinds, and returns where they are and their names.
func makeStore(t *testing.T) (root string, names []string) {
	t.Helper()
	root = t.TempDir()
	for i := range 100 {
		write(t, filepath.Join(root, "many", fmt.Sprint(i%7), fmt.Sprint(i)), random(uint64(i), 39*i))
	}
	for i, n := range []int{0, 1, 1023, 1024, 1025, 16383, 16384, 32767, 32768, 32769, 65536} {
		write(t, filepath.Join(root, fmt.Sprint("file", n)), random(uint64(1000+i), n))
		write(t, filepath.Join(root, "sizes", fmt.Sprint(n)), random(uint64(2000+i), n))
		names = append(names, fmt.Sprint("file", n))
	}
	write(t, filepath.Join(root, "large", "random"), random(3000, 600<<10))
	write(t, filepath.Join(root, "large", "zeros"), make([]byte, 600<<10))
	write(t, filepath.Join(root, "large", "zeros, small"), make([]byte, 9000))
	write(t, filepath.Join(root, "odd", "file"), random(3001, 100000))
	must(t, errors.Join(os.Mkdir(filepath.Join(root, "odd", "empty"), 0o755), os.Symlink("nowhere", filepath.Join(root, "link"))))
	return root, append(names, "many", "sizes", "large", "odd", "link")
}

// encode returns the blocks of an item, as the encoder makes them.
func encode(t testing.TB, path string) map[eris.Reference][]byte {
	t.Helper()
	blocks := sourcetest.NewBackend()
	_, err := publish.Encode(t.Context(), path, blocks.Put, erisfs.EncodeOptions{})
	must(t, err)
	return blocks.All()
}

func open(t testing.TB, directory, root string) *Table {
	t.Helper()
	table, err := Open(directory, root, t.Logf)
	must(t, err)
	t.Cleanup(func() { table.Close() })
	return table
}

func update(t testing.TB, table *Table, names ...string) {
	t.Helper()
	must(t, table.Update(t.Context(), names))
}

// missing asks for all blocks at a time, in both sizes, and returns how many there are not. What
// comes must be right.
func missing(t testing.TB, table *Table, blocks map[eris.Reference][]byte) (n int) {
	t.Helper()
	var group sync.WaitGroup
	var absent atomic.Int64
	for ref, block := range blocks {
		group.Go(func() {
			got, err := fetch.Get(t.Context(), table, ref, eris.BlockSize(len(block)), nil)
			if errors.Is(err, eris.ErrNotFound) {
				absent.Add(1)
			} else if err != nil || !bytes.Equal(got, block) {
				t.Errorf("block %v: %d bytes, %v", ref, len(got), err)
			}
			other := eris.BlockSize1KiB + eris.BlockSize32KiB - eris.BlockSize(len(block))
			if got, err := fetch.Get(t.Context(), table, ref, other, nil); !errors.Is(err, eris.ErrNotFound) {
				t.Errorf("block %v in the other size: %d bytes, %v", ref, len(got), err)
			}
		})
	}
	group.Wait()
	return int(absent.Load())
}

// encodeAll returns the blocks of items.
func encodeAll(t testing.TB, root string, names ...string) map[eris.Reference][]byte {
	t.Helper()
	all := map[eris.Reference][]byte{}
	for _, name := range names {
		maps.Copy(all, encode(t, filepath.Join(root, name)))
	}
	return all
}

func wantAll(t testing.TB, table *Table, blocks map[eris.Reference][]byte) {
	t.Helper()
	if n := missing(t, table, blocks); n > 0 {
		t.Fatalf("%d of %d blocks are missing", n, len(blocks))
	}
}

func runFiles(t testing.TB, directory string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(directory, "*"+suffix))
	must(t, err)
	return names
}

// TestBlocks compares what is made with what the encoder makes, with a new table and one that was
// there.
func TestBlocks(t *testing.T) {
	root, names := makeStore(t)
	directory := t.TempDir()
	table := open(t, directory, root)
	update(t, table, names...)
	all := encodeAll(t, root, names...)
	wantAll(t, table, all)
	stats := table.Stats()
	if stats.Items != len(names) || stats.Found != int64(len(all)) || stats.Absent != int64(len(all)) {
		t.Fatalf("%+v for %d items and %d blocks", stats, len(names), len(all))
	}
	absent := make([]byte, fetch.HavePrefix)
	for ref := range all {
		answer := table.Have(append(absent, ref[:fetch.HavePrefix]...))
		for _, known := fetch.Has(answer, 1); !known; _, known = fetch.Has(answer, 1) { // it has run out of time
			answer = table.Have(append(absent, ref[:fetch.HavePrefix]...))
		}
		if has, _ := fetch.Has(answer, 0); has {
			t.Fatal("it has what nobody has")
		}
		if has, _ := fetch.Has(answer, 1); !has {
			t.Fatalf("it does not have %v", ref)
		}
	}
	if _, err := Open(directory, root, t.Logf); !errors.Is(err, files.ErrLocked) {
		t.Fatalf("opened twice: %v", err)
	}
	table.Close()
	before := runFiles(t, directory)
	table = open(t, directory, root)
	update(t, table, names...)
	wantAll(t, table, all)
	if after := runFiles(t, directory); !slices.Equal(before, after) {
		t.Fatalf("the table was written anew: %v, %v", before, after)
	}
}

// TestAppearAndGo has items come and go, among them two with the same file.
func TestAppearAndGo(t *testing.T) {
	root, directory := t.TempDir(), t.TempDir()
	table := open(t, directory, root)
	var names []string
	all := map[eris.Reference][]byte{}
	own := map[string]map[eris.Reference][]byte{}
	for i := range 40 {
		name := fmt.Sprint("item", i)
		names = append(names, name)
		write(t, filepath.Join(root, name, "own"), random(uint64(i), 20000+3000*i))
		write(t, filepath.Join(root, name, "same"), random(5000, 50000))
		update(t, table, names...)
		own[name] = encode(t, filepath.Join(root, name))
		maps.Copy(all, own[name])
	}
	wantAll(t, table, all)
	if n := len(runFiles(t, directory)); n != 1 {
		t.Fatalf("small runs remain small: %d of them", n)
	}
	size := table.Stats().Bytes
	for _, name := range names[:30] { // collected
		must(t, os.RemoveAll(filepath.Join(root, name)))
	}
	update(t, table, names[30:]...)
	for _, name := range names[30:] {
		wantAll(t, table, own[name])
	}
	if n, want := missing(t, table, own["item3"]), len(own["item3"])-len(encode(t, filepath.Join(root, "item30", "same")))+1; n != want {
		t.Fatalf("%d blocks of an item that has gone are missing instead of %d", n, want)
	}
	if after := table.Stats().Bytes; after > size/2 {
		t.Fatalf("%d bytes are left of %d", after, size)
	}
	update(t, table)
	if stats := table.Stats(); stats.Items+int(stats.Bytes) != 0 || len(runFiles(t, directory)) != 0 {
		t.Fatalf("something is left: %+v", stats)
	}
	write(t, filepath.Join(root, "item0", "own"), random(1, 99999)) // built again, otherwise
	update(t, table, "item0")
	wantAll(t, table, encode(t, filepath.Join(root, "item0")))
}

// TestRuns has blocks in one run, in another, and in both, of which then either will do.
func TestRuns(t *testing.T) {
	root := t.TempDir()
	var tables [2]*Table
	all := map[eris.Reference][]byte{}
	for i := range tables {
		name := fmt.Sprint("item", i)
		write(t, filepath.Join(root, name, "own"), random(uint64(i), 100000))
		write(t, filepath.Join(root, name, "same"), random(7, 50000))
		maps.Copy(all, encode(t, filepath.Join(root, name)))
		tables[i] = open(t, t.TempDir(), root)
		update(t, tables[i], name)
	}
	table := tables[0]
	table.replace(nil, tables[1].runs[0])
	tables[1].runs = nil
	wantAll(t, table, all)
	same := encode(t, filepath.Join(root, "item0", "same"))
	must(t, os.RemoveAll(filepath.Join(root, "item0", "same")))
	for ref, block := range same {
		if all[ref] == nil {
			continue // of an item that is this file alone
		}
		for home := range 2 {
			w := worker{table: table}
			done := make(chan *fetch.Request, 1)
			r := &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize(len(block)), Done: func(r *fetch.Request) { done <- r }}
			w.answer([]lookup{{request: r, first: home}})
			if <-done; r.Err != nil || !bytes.Equal(r.Block, block) {
				t.Errorf("from run %d on: %v", home, r.Err)
			}
			w.closeFile()
		}
	}
}

// TestChanged has files change, and go, without anybody telling.
func TestChanged(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, "a", "file")
	for name, change := range map[string]func(t *testing.T){
		"other contents": func(t *testing.T) { write(t, file, random(8, 100000)) },
		"shorter":        func(t *testing.T) { write(t, file, random(7, 100000)[:40000]) },
		"gone":           func(t *testing.T) { must(t, os.RemoveAll(filepath.Dir(file))) },
		"pipe":           func(t *testing.T) { must(t, errors.Join(os.Remove(file), unix.Mkfifo(file, 0o600))) },
	} {
		t.Run(name, func(t *testing.T) {
			os.Remove(file)
			write(t, file, random(7, 100000))
			write(t, filepath.Join(root, "b"), random(9, 100000))
			leaves, b := encode(t, filepath.Dir(file)), encode(t, filepath.Join(root, "b"))
			table := open(t, t.TempDir(), root)
			update(t, table, "a", "b")
			wantAll(t, table, leaves)
			change(t)
			if missing(t, table, leaves) == 0 {
				t.Fatal("blocks are found that no file has")
			}
			wantAll(t, table, b)
			update(t, table, "a", "b") // which must not fail where the item cannot be read any more
			wantAll(t, table, b)
			if _, err := os.ReadDir(filepath.Dir(file)); err == nil && name != "pipe" {
				wantAll(t, table, encode(t, filepath.Join(root, "a")))
			}
		})
	}
}

// TestDamage damages the table in many ways, before it is opened and while it is open. After it was
// opened, and perhaps asked once, it must be whole again.
func TestDamage(t *testing.T) {
	root, names := makeStore(t)
	directory := t.TempDir()
	table := open(t, directory, root)
	update(t, table, names...)
	path := runFiles(t, directory)[0]
	whole, err := os.ReadFile(path)
	must(t, err)
	table.Close()
	put := func(b []byte) string {
		for _, old := range runFiles(t, directory) {
			must(t, os.Remove(old))
		}
		must(t, os.WriteFile(path, b, 0o600))
		return directory
	}
	all := encodeAll(t, root, names...)
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 30 {
		b := bytes.Clone(whole)
		switch r.IntN(6) {
		case 0:
			b = b[:r.IntN(len(b))]
		case 1:
			b = append(b, random(r.Uint64(), 1+r.IntN(100))...)
		case 2: // in the footer
			b[len(b)-1-r.IntN(footerSize)] ^= 1 << r.IntN(8)
		case 3: // in the tables
			b[len(b)-1-r.IntN(len(b)/3)] ^= 1 << r.IntN(8)
		default:
			copy(b[r.IntN(len(b)):], random(r.Uint64(), 1+r.IntN(len(b)/10)))
		}
		if n%3 == 0 { // it must not give wrong blocks, and not panic
			table := open(t, put(whole), root)
			update(t, table, names...)
			must(t, os.WriteFile(path, b, 0o600))
			missing(t, table, all)
			table.Close()
		}
		table := open(t, put(b), root)
		update(t, table, names...)
		missing(t, table, all)
		update(t, table, names...)
		wantAll(t, table, all)
		table.Close()
	}
}

// TestKilled kills processes that make a table, at any moment.
func TestKilled(t *testing.T) {
	root, directory := t.TempDir(), t.TempDir()
	var names []string
	for i := range 200 {
		names = append(names, fmt.Sprint("item", i))
		write(t, filepath.Join(root, names[i], "a"), random(uint64(i), 300*i))
		write(t, filepath.Join(root, names[i], "b"), random(uint64(i), 30*i))
	}
	all := encodeAll(t, root, names...)
	r := rand.New(rand.NewPCG(3, 4))
	for range 15 {
		c := exec.Command(os.Args[0], root)
		c.Env = append(os.Environ(), killedVariable+"="+directory)
		out, err := c.StdoutPipe()
		must(t, err)
		must(t, c.Start())
		lines := bufio.NewScanner(out)
		for n := r.IntN(20); n >= 0 && lines.Scan(); n-- {
			for range r.IntN(100000) { // any moment, not only that after a line
			}
		}
		_ = c.Process.Kill()
		_ = c.Wait()
	}
	table := open(t, directory, root)
	update(t, table, names...)
	wantAll(t, table, all)
	left, err := os.ReadDir(directory)
	must(t, err)
	if len(left) != 2 { // the lock and a run
		t.Fatalf("%v is left", left)
	}
}

// TestForgedReference asks for references that begin like others: nobody may have a table made anew
// by that.
func TestForgedReference(t *testing.T) {
	root, names := makeStore(t)
	table := open(t, t.TempDir(), root)
	update(t, table, names...)
	all := encode(t, filepath.Join(root, "large"))
	for ref, block := range all {
		forged := ref
		forged[31] ^= 1
		if _, err := fetch.Get(t.Context(), table, forged, eris.BlockSize(len(block)), nil); !errors.Is(err, eris.ErrNotFound) {
			t.Fatalf("forged reference: %v", err)
		}
	}
	if table.changed.Load() {
		t.Fatal("something counts as changed")
	}
	wantAll(t, table, all)
}

// TestSkipped has items that cannot be encoded, and names that are none.
func TestSkipped(t *testing.T) {
	root, names := makeStore(t)
	must(t, errors.Join(os.Mkdir(filepath.Join(root, "bad"), 0o755), unix.Mkfifo(filepath.Join(root, "bad", "pipe"), 0o600)))
	var logged []string
	table, err := Open(t.TempDir(), root, func(format string, a ...any) { logged = append(logged, fmt.Sprintf(format, a...)) })
	must(t, err)
	defer table.Close()
	bad := append([]string{"bad", "absent", "", ".", "..", "../x", "many/1", strings.Repeat("x", 256)}, names...)
	if os.Geteuid() != 0 {
		write(t, filepath.Join(root, "secret"), []byte("secret"))
		must(t, os.Chmod(filepath.Join(root, "secret"), 0))
		bad = append(bad, "secret")
	}
	for range 2 { // told once
		update(t, table, bad...)
		if n := table.Stats().Items; n != len(names) {
			t.Fatalf("%d items instead of %d", n, len(names))
		}
	}
	if want := 2 + len(bad) - len(names) - 8; len(logged) != want {
		t.Fatalf("logged %q", logged)
	}
	write(t, filepath.Join(root, "absent"), []byte("now it is there"))
	update(t, table, names...)
	update(t, table, append(names, "absent")...)
	wantAll(t, table, encode(t, filepath.Join(root, "absent")))
}

// TestCloseAndCancel has requests end while the table changes: each once, whatever happens.
func TestCloseAndCancel(t *testing.T) {
	root, names := makeStore(t)
	all := encode(t, filepath.Join(root, "large"))
	table := open(t, t.TempDir(), root)
	update(t, table, names...)
	var group sync.WaitGroup
	var calls, wanted atomic.Int64
	for ref, block := range all {
		for i := range 4 {
			group.Go(func() {
				r := &fetch.Request{Pair: eris.Pair{Reference: ref}, Size: eris.BlockSize(len(block)), Dst: make([]byte, 0, len(block))}
				done := make(chan struct{}, 2)
				r.Done = func(*fetch.Request) { calls.Add(1); done <- struct{}{} }
				wanted.Add(1)
				table.Start(r)
				if i == 0 {
					table.Cancel(r)
				}
				<-done
				if r.Err == nil && !bytes.Equal(r.Block, block) {
					t.Error("wrong block")
				} else if r.Err != nil && !errors.Is(r.Err, context.Canceled) && !errors.Is(r.Err, fetch.ErrClosed) {
					t.Error(r.Err)
				}
			})
		}
	}
	write(t, filepath.Join(root, "new"), random(1, 100000))
	update(t, table, append(names, "new")...)
	table.Close()
	group.Wait()
	if calls.Load() != wanted.Load() {
		t.Fatalf("%d requests were done %d times", wanted.Load(), calls.Load())
	}
	if _, err := fetch.Get(t.Context(), table, eris.Reference{}, eris.BlockSize1KiB, nil); !errors.Is(err, fetch.ErrClosed) {
		t.Fatalf("closed: %v", err)
	}
}

// TestNoRoom has no room for a larger table: the one that there is goes on. It is a process of its
// own, all files of which are limited.
func TestNoRoom(t *testing.T) {
	const variable = "ITEMS_TEST_NO_ROOM"
	if os.Getenv(variable) == "" {
		command := exec.Command(os.Args[0], "-test.run=^TestNoRoom$")
		command.Env = append(os.Environ(), variable+"=1")
		if output, err := command.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, output)
		}
		return
	}
	root := t.TempDir()
	for i := range 4 { // each has an inner node in the table
		write(t, filepath.Join(root, "item0", fmt.Sprint(i)), random(uint64(i), smallFile+1))
	}
	write(t, filepath.Join(root, "item1"), random(5, 1000))
	table := open(t, t.TempDir(), root)
	update(t, table, "item0")
	signal.Ignore(unix.SIGXFSZ)
	var usual unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &usual))
	must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 64 << 10, Max: usual.Max}))
	for range 2 {
		if err := table.Update(t.Context(), []string{"item0", "item1"}); !errors.Is(err, unix.EFBIG) {
			t.Errorf("without room: %v", err)
		}
	}
	wantAll(t, table, encode(t, filepath.Join(root, "item0")))
	must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &usual))
	update(t, table, "item0", "item1")
	wantAll(t, table, encodeAll(t, root, "item0", "item1"))
}

// TestNotBegunAgain has a table that cannot be written be tried again when something has changed,
// and not each time that this is looked at: that would read the items each time.
func TestNotBegunAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, names := makeStore(t)
		directory := t.TempDir()
		table := open(t, directory, root)
		update(t, table)
		inTheWay := filepath.Join(directory, "1"+suffix)
		write(t, filepath.Join(inTheWay, "file"), nil)
		ctx, cancel := context.WithCancel(t.Context())
		looks, tries := 0, 0
		table.Run(ctx, func() string {
			if looks++; looks < 4 {
				return "before"
			} else if looks == 4 {
				if tries != 1 {
					t.Errorf("tried %d times, while nothing changed", tries)
				}
				must(t, os.RemoveAll(inTheWay))
			} else if looks == 6 {
				cancel()
			}
			return "after"
		}, func(context.Context) ([]string, error) { tries++; return names, nil }, func(Stats) {})
		if n := table.Stats().Items; n != len(names) {
			t.Errorf("%d items instead of %d", n, len(names))
		}
	})
}
