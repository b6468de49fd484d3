// SPDX-License-Identifier: GPL-3.0-or-later

package cache

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
)

// The test binary, run with this in its environment, is another process that uses a cache: see
// runProcess.
const processVariable = "ERIS_CACHE_TEST_PROCESS"

func TestMain(m *testing.M) {
	if arguments := os.Getenv(processVariable); arguments != "" {
		if err := runProcess(arguments); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runProcess puts blocks 100 at a time until it is killed or has put so many, and gets them and
// those of others. It prints the number below which all blocks have been written. Its arguments are
// the numbers of the first block and of that after the last one, the size of the cache, and its
// directory.
func runProcess(arguments string) error {
	var first, last int
	var most int64
	var directory string
	if _, err := fmt.Sscanf(arguments, "%d %d %d %q", &first, &last, &most, &directory); err != nil {
		return err
	}
	c := Open(directory, most, nil)
	found := 0
	for i := first; i < last; i += 100 {
		put(c, i, i+100, mixed)
		for j := range 100 {
			ref, want := testBlock(i+j, mixed(i+j))
			if got, err := fetch.Get(benchContext, c, ref, mixed(i+j), nil); err == nil {
				found++
				if string(got) != string(want) {
					return fmt.Errorf("block %d is another one", i+j)
				}
			}
			// Old ones, of this process and of others, where blocks are being overwritten.
			other := rand.IntN(last)
			ref, want = testBlock(other, mixed(other))
			if got, err := fetch.Get(benchContext, c, ref, mixed(other), nil); err == nil && string(got) != string(want) {
				return fmt.Errorf("block %d is another one", other)
			}
		}
		fmt.Printf("%-16383d\n", i+100) // a pipe holds four such lines: who does not read holds it up
	}
	if total := last - first; found < total*9/10 {
		return fmt.Errorf("%d blocks of %d were there after they had been written", found, total)
	}
	return closeSurely(c)
}

// process returns another process that uses a cache.
func process(first, last int, maxBytes int64, directory string) *exec.Cmd {
	p := exec.Command(os.Args[0])
	p.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %d %q", processVariable, first, last, maxBytes, directory))
	p.Stderr = os.Stderr
	return p
}

// A process is killed while it puts blocks, again and again. What it had written is found by the
// next.
func TestKill(t *testing.T) {
	const most = 64 << 20
	d := t.TempDir()
	os.Chmod(d, 0o700)
	written := map[int]int{}
	for round := range 6 {
		first := round * 1_000_000
		p := process(first, first+1_000_000, most, d)
		output, err := p.StdoutPipe()
		must(t, err)
		must(t, p.Start())
		n := rand.IntN(20)
		for lines := bufio.NewScanner(output); lines.Scan(); n-- {
			if written[first], err = strconv.Atoi(strings.TrimSpace(lines.Text())); err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				must(t, p.Process.Kill())
			}
		}
		if err := p.Wait(); err == nil || p.ProcessState.Exited() {
			t.Fatalf("the process was not killed: %v", err)
		}
	}
	c := testOpen(t, d, most)
	total := 0
	for first, last := range written {
		total += last - first
		// A bucket may be full, and two entries may be taken for each other; rarely.
		if got := count(t, c, first, last, mixed); got < (last-first)*99/100 {
			t.Errorf("%d blocks of %d are there after the process was killed", got, last-first)
		}
	}
	if total < 600 {
		t.Errorf("only %d blocks", total)
	}
}

// Several processes at a time, one of which is killed, overwrite each other's blocks, and find what
// they have just written.
func TestProcesses(t *testing.T) {
	const most = 8 << 20
	d := t.TempDir()
	os.Chmod(d, 0o700)
	victim := process(1_000_000, 2_000_000, most, d)
	must(t, victim.Start())
	var others []*exec.Cmd
	for i := range 3 {
		p := process(i*10_000, i*10_000+3000, most, d)
		must(t, p.Start())
		others = append(others, p)
	}
	c := testOpen(t, d, most)
	put(c, 50_000, 50_100, mixed)
	for i, p := range others {
		if i == 1 {
			victim.Process.Kill()
			victim.Wait()
		}
		must(t, p.Wait())
	}
	put(c, 60_000, 60_100, mixed)
	if got := count(t, c, 60_000, 60_100, mixed); got < 99 {
		t.Errorf("%d blocks of 100 after all others", got)
	}
}

// Processes that find no file make one at the same time. It is the same for all.
func TestCreateAtOnce(t *testing.T) {
	for range 20 {
		d := t.TempDir()
		os.Chmod(d, 0o700)
		caches := make(chan *Cache)
		for range 8 {
			go func() {
				c := Open(d, 1<<20, func(err error) { t.Error(err) })
				c.Has(t.Context(), eris.Reference{}, small) // opens it
				caches <- c
			}()
		}
		for i := range 8 {
			c := <-caches
			if i == 0 {
				put(c, 0, 10, func(int) eris.BlockSize { return small })
			}
			if got := count(t, c, 0, 10, func(int) eris.BlockSize { return small }); got != 10 {
				t.Errorf("%d blocks of 10", got)
			}
			must(t, closeSurely(c))
		}
	}
}

// A cache leaves room on a file system for others, and goes on in what it has; on a full one it
// keeps nothing, and finds what it had.
func TestFullDisk(t *testing.T) {
	const most = 16 << 20
	mount := t.TempDir()
	if err := syscall.Mount("tmpfs", mount, "tmpfs", 0, "size=8m"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	defer func() {
		must(t, syscall.Unmount(mount, 0))
	}()
	d, filler := filepath.Join(mount, "cache"), filepath.Join(mount, "filler")
	open := func() *Cache {
		t.Helper()
		return Open(d, most, func(err error) { t.Error(err) })
	}
	all := func(int) eris.BlockSize { return large }
	c := open()
	put(c, 0, 1000, all) // 32 MiB
	free := func() uint64 {
		var s syscall.Statfs_t
		must(t, syscall.Statfs(mount, &s))
		return s.Bavail * uint64(s.Bsize)
	}
	if left := free(); left == 0 {
		t.Error("the cache has filled the file system")
	}
	// As much as there is room for is there, and it is the newest.
	if got := count(t, c, 880, 1000, all); got < 119 { // some 4 MiB
		t.Errorf("%d blocks", got)
	}
	// Others take what is left.
	b := make([]byte, 4<<20)
	if err := os.WriteFile(filler, b, 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if left := free(); left != 0 {
		t.Fatalf("%d bytes are left", left)
	}
	put(c, 1000, 1100, all) // over what is there
	if got := count(t, c, 1000, 1100, all); got < 90 {
		t.Errorf("%d blocks of 100 on a full file system", got)
	}
	must(t, closeSurely(c))
	// A new cache has no room.
	must(t, os.Remove(filepath.Join(d, fileName)))
	os.WriteFile(filler, make([]byte, 8<<20), 0o600)
	var failed error
	c = Open(d, most, func(err error) { failed = err })
	if err := errors.Join(put(c, 0, 1000, all), failed); err == nil {
		t.Error("blocks are lost, and nothing says so")
	}
	if got := count(t, c, 0, 1000, all); got != 0 {
		t.Errorf("%d blocks without room", got)
	}
	must(t, closeSurely(c))
	// Room again.
	must(t, os.Remove(filler))
	c = open()
	put(c, 0, 100, all)
	if got := count(t, c, 0, 100, all); got < 99 {
		t.Errorf("%d blocks of 100", got)
	}
	must(t, closeSurely(c))
}
