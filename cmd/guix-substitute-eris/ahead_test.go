// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
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
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
)

// aheadTest is a store, a daemon process, which this one plays, and a server that answers no
// request for a nar before some number of them are under way.
type aheadTest struct {
	t     *testing.T
	store string
	env   []string
	items []aheadItem
	size  int // of the contents of items, about

	mu      sync.Mutex
	changed sync.Cond
	waiting int            // requests for nars that are under way
	most    int            // the greatest number so far
	needed  int            // until nars are sent
	passed  int            // how often there have been enough
	closed  bool           // nobody is answered any more
	gone    []string       // the names of items whose answer was not waited for
	asked   map[string]int // requests by the name of the item
}

type aheadItem struct {
	path       string
	references []string
	narinfo    string
	nar        []byte
}

// newAheadTest makes items: as many that refer to nothing, and half as many that refer to some.
func newAheadTest(t *testing.T, needed int, configuration string) *aheadTest {
	directory := t.TempDir()
	a := &aheadTest{t: t, store: directory + "/store", needed: needed, size: 11_000, asked: map[string]int{}}
	a.changed.L = &a.mu
	// What cleans up after a helper is a process that may write there for a moment longer.
	t.Cleanup(func() {
		eventually(t, "the directory is still used", func() bool { return !isArgument(directory + "/") })
		makeWritable(directory)
		must(t, os.RemoveAll(directory))
	})
	a.setServer("")
	a.configure(configuration)
	a.makeItems(12)
	a.serve(a.ServeHTTP)
	t.Cleanup(func() { a.open(0, true) })
	return a
}

func (a *aheadTest) configure(text string) {
	must(a.t, os.WriteFile(a.store+"/../etc/substitute-eris.toml", []byte(text), 0o600))
}

// setServer has helpers use a server.
func (a *aheadTest) setServer(url string) {
	a.env = append(machineEnvironment(a.t, filepath.Dir(a.store), "substitute-urls="+url+"\n"), "GUIX_ALLOW_UNAUTHENTICATED_SUBSTITUTES=yes")
}

// serve has helpers use a server of its own, for as long as the test takes.
func (a *aheadTest) serve(handler http.HandlerFunc) {
	server := httptest.NewServer(handler)
	a.t.Cleanup(server.Close)
	a.setServer(server.URL)
}

func (a *aheadTest) makeItems(leaves int) {
	random := rand.New(rand.NewPCG(3, 4))
	for i := range leaves + leaves/2 {
		hash := fmt.Sprintf("%032d", i)
		item := aheadItem{path: fmt.Sprintf("%s/%s-item%d", a.store, hash, random.IntN(1000))}
		if i >= leaves {
			for _, k := range random.Perm(i)[:3] {
				item.references = append(item.references, a.items[k].path)
			}
		}
		tree := filepath.Join(a.t.TempDir(), "tree")
		writeFiles(a.t, tree, map[string]string{"lib/file": strings.Repeat(item.path+"\n", a.size/len(item.path))})
		item.nar = archiveOf(a.t, tree)
		var references []string
		for _, r := range item.references {
			references = append(references, filepath.Base(r))
		}
		item.narinfo = fmt.Sprintf("StorePath: %s\nURL: nar/%s\nCompression: none\nNarHash: %s\nNarSize: %d\nReferences: %s\n",
			item.path, filepath.Base(item.path), hashText(sha256.Sum256(item.nar)), len(item.nar), strings.Join(references, " "))
		a.items = append(a.items, item)
	}
}

func (a *aheadTest) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := filepath.Base(r.URL.Path)
	for _, item := range a.items {
		switch base := filepath.Base(item.path); name {
		case base[:32] + ".narinfo":
			io.WriteString(w, item.narinfo)
			return
		case base:
			defer context.AfterFunc(r.Context(), func() {
				a.mu.Lock()
				defer a.mu.Unlock()
				a.gone = append(a.gone, base)
			})()
			if !a.pass(base) {
				w.WriteHeader(http.StatusNotFound)
			} else {
				w.Write(item.nar)
			}
			return
		}
	}
	w.WriteHeader(http.StatusNotFound)
}

// pass waits until enough requests are under way.
func (a *aheadTest) pass(name string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked[name]++
	a.waiting++
	a.most = max(a.most, a.waiting)
	a.changed.Broadcast()
	// Who has waited with enough others is not held up by what is needed from then on.
	passed := a.passed
	for a.waiting < a.needed && passed == a.passed {
		a.changed.Wait()
	}
	if passed == a.passed {
		a.passed++
		a.needed = 0
	}
	a.changed.Broadcast()
	a.waiting--
	return !a.closed
}

// open lets requests pass.
func (a *aheadTest) open(needed int, closed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.needed, a.closed = needed, closed
	a.changed.Broadcast()
}

// await waits until so many requests are under way.
func (a *aheadTest) await(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.waiting < n {
		a.changed.Wait()
	}
}

// fetched checks how often the nar of an item was asked for.
func (a *aheadTest) fetched(item aheadItem, want int) {
	a.t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := a.asked[filepath.Base(item.path)]; n != want {
		a.t.Errorf("%s was fetched %d times", item.path, n)
	}
}

// fetchedOnce checks that the nars of all items were asked for once, and that a log has each item
// begin and end once.
func (a *aheadTest) fetchedOnce(log string) {
	a.t.Helper()
	for _, item := range a.items {
		a.fetched(item, 1)
		for _, event := range []string{"started", "succeeded"} {
			if n := strings.Count(log, "@ download-"+event+" "+item.path+" "); n != 1 {
				a.t.Errorf("%s has %s %d times\n%s", item.path, event, n, log)
			}
		}
	}
}

func (a *aheadTest) start(mode string) *daemonHelper {
	a.t.Helper()
	d, err := startDaemonHelper(theProgram, mode, a.env, false)
	must(a.t, err)
	return d
}

// query asks about each item on its own, as the daemon does before it substitutes them, after what
// a client has the daemon ask first.
func (a *aheadTest) query(first ...string) {
	a.t.Helper()
	var requests strings.Builder
	requests.WriteString(strings.Join(first, ""))
	for _, item := range a.items {
		fmt.Fprintf(&requests, "info %s\n", item.path)
	}
	d := a.start("query")
	replies, err := d.talk(requests.String())
	err = cmp.Or(err, d.close())
	if n := strings.Count(replies, "-item"); err != nil || n < len(a.items) {
		a.t.Fatalf("%d items are available, %v\n%s", n, err, d.log.String())
	}
}

// begin asks about all items, and starts the helper that is to substitute them in an order.
func (a *aheadTest) begin() (d *daemonHelper, order []aheadItem) {
	a.t.Helper()
	a.query()
	return a.start("substitute"), a.order()
}

// order returns the items in the order in which the daemon substitutes them.
func (a *aheadTest) order() []aheadItem {
	left := slices.Clone(a.items)
	slices.SortFunc(left, func(x, y aheadItem) int {
		return strings.Compare(filepath.Base(x.path)[33:]+"$"+x.path, filepath.Base(y.path)[33:]+"$"+y.path)
	})
	done := map[string]bool{}
	var order []aheadItem
	for len(left) > 0 {
		i := slices.IndexFunc(left, func(item aheadItem) bool {
			return !slices.ContainsFunc(item.references, func(r string) bool { return !done[r] })
		})
		done[left[i].path] = true
		order = append(order, left[i])
		left = slices.Delete(left, i, i+1)
	}
	return order
}

// substitute has a helper substitute an item.
func (a *aheadTest) substitute(d *daemonHelper, item aheadItem, destination string) {
	a.t.Helper()
	reply, err := d.ask(fmt.Sprintf("substitute %s %s\n", item.path, destination))
	if err != nil || !strings.HasPrefix(reply, "success sha256:") {
		a.t.Fatalf("%s: reply %q, %v", item.path, reply, err)
	}
	text, err := os.ReadFile(destination + "/lib/file")
	if err != nil || !bytes.HasPrefix(text, []byte(item.path+"\n")) {
		a.t.Fatalf("%s has other contents: %v", destination, err)
	}
	info, err := os.Stat(destination)
	if err != nil || info.Mode().Perm() != 0o555 || info.ModTime().Unix() != 1 {
		a.t.Fatalf("%s: mode %v, time %v, error %v", destination, info.Mode(), info.ModTime(), err)
	}
}

// left returns what is in the store beside items and the directory of links.
func (a *aheadTest) left() (names []string) {
	entries, err := os.ReadDir(a.store)
	must(a.t, err)
	for _, e := range entries {
		if !strings.Contains(e.Name(), "-item") && e.Name() != ".links" {
			names = append(names, e.Name())
		}
	}
	return names
}

func (a *aheadTest) nothingLeft() {
	a.t.Helper()
	if left := a.left(); len(left) > 0 {
		a.t.Errorf("%v are left", left)
	}
}

// substituteRest has helpers substitute what is not there yet, by turns.
func (a *aheadTest) substituteRest(helpers ...*daemonHelper) {
	a.t.Helper()
	for i, item := range a.order() {
		if _, err := os.Lstat(item.path); err != nil {
			a.substitute(helpers[i%len(helpers)], item, item.path)
		}
	}
}

// substituteAll does that, and ends the helpers.
func (a *aheadTest) substituteAll(helpers ...*daemonHelper) {
	a.t.Helper()
	a.substituteRest(helpers...)
	for _, d := range helpers {
		must(a.t, d.close())
	}
	a.nothingLeft()
}

// Nars are fetched before the daemon asks for their items: nothing would come otherwise. Users see
// each item begin and end once, and nothing is left.
func TestAhead(t *testing.T) {
	a := newAheadTest(t, 8, "")
	d, _ := a.begin()
	a.substituteRest(d)
	a.nothingLeft() // the daemon kills its helpers when it needs them no more
	must(t, d.close())
	a.fetchedOnce(d.log.String())
	eventually(t, "nothing is counted, or something is wasted", func() bool {
		counts := a.counts()
		return counts.Staged >= 8 && counts.Used == counts.Staged && counts.UsedBytes == counts.StagedBytes
	})
}

// counts returns what doctor says of what was substituted ahead, also in words.
func (a *aheadTest) counts() (counts sourcestate.Ahead) {
	command := exec.Command(theProgram, "doctor", "--json", "--substitute-urls=http://127.0.0.1:1", "--eris-store-url=none")
	command.Env = a.env
	text, _ := command.Output() // for there are things to mend
	var findings []struct {
		Subject, Detail string
		Data            json.RawMessage
	}
	if err := json.Unmarshal(text, &findings); err != nil {
		a.t.Fatalf("%v: %s", err, text)
	}
	for _, f := range findings {
		if f.Subject != "ahead of the daemon" {
			continue
		}
		must(a.t, json.Unmarshal(f.Data, &counts))
		words := fmt.Sprintf("%d items staged, %d used, %s wasted", counts.Staged, counts.Used,
			page.Size(counts.StagedBytes-counts.UsedBytes))
		detail, since, _ := strings.Cut(f.Detail, ", since ")
		day, err := time.Parse(time.DateOnly, since) // it may have been yesterday
		if detail != words || err != nil || time.Since(day) > 48*time.Hour {
			a.t.Errorf("%q, want %q", f.Detail, words)
		}
	}
	return counts
}

// No more is staged than may be: what nobody asks for costs at most that.
func TestAheadBounds(t *testing.T) {
	for name, most := range map[string]int{"ahead-items = 0\n": 1, "ahead-bytes = \"%d\"\n": 4} {
		a := newAheadTest(t, most, "")
		if strings.Contains(name, "%") {
			name = fmt.Sprintf(name, 3*len(a.items[0].nar)+1000)
		}
		a.configure(name)
		a.query()
		a.substituteAll(a.start("substitute"))
		if a.most != most {
			t.Errorf("%s: %d nars were fetched at the same time", name, a.most)
		}
	}
}

// What is staged takes no room from what the daemon waits for: where the disk has become full, it
// is given up.
func TestAheadFullDisk(t *testing.T) {
	a := newAheadTest(t, 4, "")
	if err := unix.Mount("none", a.store, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(a.store, unix.MNT_DETACH)) })
	a.configure(fmt.Sprintf("ahead-bytes = \"%d\"\n", 3*len(a.items[0].nar)+1000))
	d, order := a.begin()
	a.substitute(d, order[0], order[0].path)
	eventually(t, "not as much is staged as may be", func() bool {
		return len(slices.DeleteFunc(slices.Clone(order), func(item aheadItem) bool { return !a.staged(item) })) == 3
	})
	a.open(0, false)
	filler, err := os.Create(a.store + "/filler")
	must(t, err)
	if _, err := io.Copy(filler, rand.NewChaCha8([32]byte{})); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	must(t, filler.Close())
	other := slices.IndexFunc(order, func(item aheadItem) bool {
		return item.path != order[0].path && len(item.references) == 0 && !a.staged(item)
	})
	a.substitute(d, order[other], order[other].path)
	must(t, os.Remove(filler.Name()))
	a.substituteAll(d)
	if log := d.log.String(); strings.Contains(log, "no space left") {
		t.Error(log)
	}
}

// Two helpers of one daemon process fetch nothing twice, and show each item, whoever has staged it.
func TestAheadTwoHelpers(t *testing.T) {
	a := newAheadTest(t, 8, "")
	a.query()
	one, other := a.start("substitute"), a.start("substitute")
	a.substituteAll(one, other)
	a.fetchedOnce(one.log.String() + other.log.String())
}

// What the daemon has asked another helper for is locked by it, and not staged, although there is
// nothing of it yet.
func TestAheadLocked(t *testing.T) {
	a := newAheadTest(t, 3, "ahead-items = 2\n") // or others are perhaps asked for before the one that is meant
	order := a.order()
	must(t, os.WriteFile(order[1].path+".lock", nil, 0o600))
	d, _ := a.begin()
	a.substitute(d, order[0], order[0].path)
	must(t, d.close())
	a.fetched(order[1], 0)
	a.fetched(order[2], 1)
}

// What is repaired is restored from its source, not from the stage.
func TestAheadRepair(t *testing.T) {
	a := newAheadTest(t, 8, "")
	d, order := a.begin()
	a.substitute(d, order[0], order[0].path)
	a.substitute(d, order[1], order[1].path+".tmp")
	must(t, d.close())
	a.fetched(order[1], 2)
}

// stage returns the entries of the stage, without locks; none if there is no stage.
func (a *aheadTest) stage() (names []string) {
	found, err := filepath.Glob(a.store + "/.guix-substitute-eris/*/*")
	must(a.t, err)
	return slices.DeleteFunc(found, func(name string) bool { return strings.HasSuffix(name, ".lock") })
}

// staged reports whether an item is staged and complete.
func (a *aheadTest) staged(item aheadItem) bool {
	return slices.ContainsFunc(a.stage(), func(name string) bool {
		return strings.HasPrefix(filepath.Base(name), filepath.Base(item.path)[:32]) && filepath.Ext(name) == ""
	})
}

// eventually waits until a condition holds, which it will, however long that takes.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// When a client goes away the daemon kills its helpers, with all of their process group, and ends:
// what was staged is gone soon, although nobody starts another helper.
func TestAheadClientLeaves(t *testing.T) {
	a := newAheadTest(t, 8, "")
	d, order := a.begin()
	a.substitute(d, order[0], order[0].path)
	eventually(t, "it is not staged", func() bool { return a.staged(order[1]) })
	a.substitute(d, order[1], order[1].path)
	a.open(100, false)
	// Seven were sent together with the first, of which the second may be one; others perhaps not.
	eventually(t, "nothing is staged", func() bool { return len(a.stage()) >= 6 })
	must(t, syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL))
	d.close() // which says that it was killed
	eventually(t, "what was staged is left", func() bool { return len(a.left()) == 0 })
	// Whoever cleans up has counted it too.
	eventually(t, "nothing is counted", func() bool { return a.counts().Used == 1 })
}

// Items that the daemon does not ask for do not keep others from being staged.
func TestAheadPassedOver(t *testing.T) {
	a := newAheadTest(t, 3, "ahead-items = 2\n")
	d, order := a.begin()
	leaves := slices.DeleteFunc(order, func(i aheadItem) bool { return len(i.references) > 0 })
	last := len(leaves) - 1
	a.substitute(d, leaves[last], leaves[last].path) // while the first two are staged
	for i := last - 1; i >= 5; i-- {
		a.substitute(d, leaves[i], leaves[i].path)
	}
	eventually(t, "the first ones are still staged", func() bool { return !a.staged(leaves[0]) && !a.staged(leaves[1]) })
	eventually(t, "no others are staged", func() bool { return slices.ContainsFunc(a.items, a.staged) })
	a.substituteAll(d)
	eventually(t, "what was used and wasted is not counted", func() bool {
		counts := a.counts()
		return counts.Used > 0 && counts.Staged >= counts.Used+2
	})
}

// An item that cannot be moved to its place is not left in the stage.
func TestAheadInTheWay(t *testing.T) {
	a := newAheadTest(t, 8, "")
	d, order := a.begin()
	a.substitute(d, order[0], order[0].path)
	eventually(t, "it is not staged", func() bool { return a.staged(order[1]) })
	must(t, os.WriteFile(order[1].path, []byte("in the way"), 0o644))
	a.substitute(d, order[1], order[1].path)
	// By the one who used it, or who saw it in the way meanwhile.
	eventually(t, "it is still staged", func() bool { return !a.staged(order[1]) })
	must(t, d.close())
}

// Where nothing can be staged that is said, and all goes on as without.
func TestAheadNowhere(t *testing.T) {
	a := newAheadTest(t, 100, "verbose = true\n")
	must(t, os.WriteFile(a.store+"/.guix-substitute-eris", nil, 0o600))
	d, order := a.begin()
	for _, item := range order {
		a.open(100, false)
		var opened sync.WaitGroup
		opened.Go(func() {
			a.await(1)
			time.Sleep(50 * time.Millisecond) // it takes 5 ms until something is to be staged
			a.open(0, false)
		})
		a.substitute(d, item, item.path)
		opened.Wait()
	}
	must(t, d.close())
	if log := d.log.String(); !strings.Contains(log, "ahead of the daemon any more: ") {
		t.Errorf("the log does not say it:\n%s", log)
	}
	if a.most > 1 {
		t.Errorf("%d items were fetched at the same time", a.most)
	}
}

// While another process removes what helpers of the session have left, nothing is staged; and then
// it is.
func TestAheadCleaned(t *testing.T) {
	a := newAheadTest(t, 100, "verbose = true\n")
	a.query()
	sessions, err := filepath.Glob(a.store + "/../state/cache/guix/substitute-eris/sessions/*")
	if err != nil || len(sessions) != 1 {
		t.Fatalf("the sessions are %v, %v", sessions, err)
	}
	stage := filepath.Join(a.store, ".guix-substitute-eris", filepath.Base(sessions[0]))
	must(t, os.MkdirAll(stage, 0o700))
	cleaner, err := os.Open(stage)
	must(t, err)
	defer cleaner.Close()
	must(t, syscall.Flock(int(cleaner.Fd()), syscall.LOCK_EX))
	d, order := a.start("substitute"), a.order()
	replied := make(chan error)
	go func() {
		_, err := d.ask(fmt.Sprintf("substitute %s %s\n", order[0].path, order[0].path))
		replied <- err
	}()
	a.await(1)
	time.Sleep(50 * time.Millisecond) // it takes 5 ms until something is to be staged
	must(t, os.Remove(stage))
	os.Remove(filepath.Dir(stage)) // unless the next one is there already
	must(t, cleaner.Close())
	eventually(t, "nothing is staged", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.waiting >= 8
	})
	a.open(0, false)
	must(t, <-replied)
	a.substituteAll(d)
	if log := d.log.String(); strings.Contains(log, "ahead of the daemon any more") {
		t.Errorf("nothing was staged any more:\n%s", log)
	}
}

// isArgument reports whether a process has been started with a text in its arguments.
func isArgument(text string) bool {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	return slices.ContainsFunc(files, func(file string) bool {
		arguments, _ := os.ReadFile(file)
		return bytes.Contains(arguments, []byte(text))
	})
}

// children returns the processes that a process has started.
func children(t *testing.T, process int) (list []int) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", process))
	if err != nil || len(files) == 0 {
		t.Skipf("children of a process are not known here (%v)", err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file)
		for field := range strings.FieldsSeq(string(text)) {
			child, err := strconv.Atoi(field)
			must(t, err)
			list = append(list, child)
		}
	}
	return list
}

// What a helper that is killed leaves in the store is removed by the next one, if what the helper
// has started for that is killed as well.
func TestAheadKilled(t *testing.T) {
	a := newAheadTest(t, 100, "")
	d, order := a.begin()
	fmt.Fprintf(d.stdin, "substitute %s %s\n", order[0].path, order[0].path)
	a.await(8)
	if left := a.left(); len(left) != 1 {
		t.Errorf("%v are there while items are staged", left)
	}
	for _, child := range children(t, d.cmd.Process.Pid) {
		syscall.Kill(child, syscall.SIGKILL)
	}
	must(t, d.cmd.Process.Signal(syscall.SIGKILL))
	d.close() // which says that it was killed
	if len(a.left()) != 1 {
		t.Error("nothing is left for the next one")
	}
	a.open(0, false)
	a.substituteAll(a.start("substitute"))
}

// The garbage collector may remove what is staged at any time: it moves the directory away and then
// deletes it (Guix, nix/libstore/gc.cc: LocalStore::deletePathRecursive).
func TestAheadCollected(t *testing.T) {
	a := newAheadTest(t, 100, "")
	d, _ := a.begin()
	var collector sync.WaitGroup
	collector.Go(func() {
		a.await(8)
		for i := range 20 {
			trash := filepath.Join(a.store, fmt.Sprintf("trash-item%d", i))
			if os.Rename(filepath.Join(a.store, ".guix-substitute-eris"), trash) == nil {
				makeWritable(trash)
				os.RemoveAll(trash)
			}
			a.open(0, false)
			time.Sleep(time.Millisecond)
		}
	})
	a.substituteAll(d)
	collector.Wait()
}

// What is under way then is given up: it would go on to write into what is being deleted, which
// fails where something has come after a directory was read.
func TestAheadCollectedUnderWay(t *testing.T) {
	a := newAheadTest(t, 100, "")
	d, order := a.begin()
	replied := make(chan error)
	go func() {
		_, err := d.ask(fmt.Sprintf("substitute %s %s\n", order[0].path, order[0].path))
		replied <- err
	}()
	a.await(8)
	must(t, os.Rename(filepath.Join(a.store, ".guix-substitute-eris"), filepath.Join(a.store, "trash-item")))
	eventually(t, "what was collected is still being fetched", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.gone) >= 7
	})
	// In the end a server that does not answer is given up, by all.
	a.mu.Lock()
	if slices.Contains(a.gone, filepath.Base(order[0].path)) {
		t.Errorf("it is not given up for that: %v", a.gone)
	}
	a.mu.Unlock()
	a.open(0, false)
	must(t, <-replied)
	a.substituteAll(d)
}

// When the daemon is killed, its helpers do not go on: another one may want the same item.
func TestDaemonGone(t *testing.T) {
	for _, mode := range []string{"query", "substitute"} {
		a := newAheadTest(t, 0, "")
		a.query()
		asked := make(chan struct{}, 1)
		silent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if mode == "substitute" && strings.HasSuffix(r.URL.Path, ".narinfo") {
				a.ServeHTTP(w, r)
				return
			}
			select {
			case asked <- struct{}{}:
			default:
			}
			// All is silent in the middle, or takes as long as may be.
			for w.Write(a.items[0].nar[:1000]); r.Context().Err() == nil; time.Sleep(time.Millisecond) {
				if w.(http.Flusher).Flush(); mode == "query" {
					w.Write([]byte("# more\n"))
				}
			}
		}))
		defer silent.Close()
		a.setServer(silent.URL)
		if mode == "query" {
			a.items[0].path = a.store + "/" + strings.Repeat("z", 32) + "-unknown"
		}
		d := a.start(mode)
		request := map[string]string{"query": "info %[1]s\n", "substitute": "substitute %[1]s %[1]s\n"}[mode]
		fmt.Fprintf(d.stdin, request, a.items[0].path)
		<-asked
		d.replies.Close()
		d.stdin.Close()
		late := time.AfterFunc(20*time.Second, func() {
			t.Errorf("%s: it goes on", mode)
			d.cmd.Process.Kill()
		})
		d.close() // which says that there was nobody to reply to
		late.Stop()
		if left := a.left(); len(left) > 0 {
			t.Errorf("%s: %v are left", mode, left)
		}
		if _, err := os.Lstat(a.items[0].path); err == nil {
			t.Errorf("%s: the item is left", mode)
		}
	}
}

// A store of this machine that takes nothing of what is to be seeded holds up no request, also when
// stores of the local network come and go.
func TestSeedsHoldUpNothing(t *testing.T) {
	directory := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(directory, "s"))
	must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			go io.Copy(io.Discard, c)
		}
	}()
	a := newAheadTest(t, 0, fmt.Sprintf("policy = \"http-first\"\nseed-nars = true\nahead-items = 0\neris-stores = [\"coap+unix://%s/s\"]\n", directory))
	for i := range a.env {
		a.env[i] = strings.Replace(a.env[i], "discover=false", "discover=true", 1)
	}
	kept := filepath.Join(filepath.Dir(a.store), "state/cache/guix/substitute-eris")
	neighbours := filepath.Join(kept, "neighbours")
	err = errors.Join(os.MkdirAll(kept+"/seeds", 0o700), os.WriteFile(kept+"/seeds/nar-1", make([]byte, 10000), 0o600), os.WriteFile(neighbours, nil, 0o600))
	must(t, err)
	d, order := a.begin()
	a.substitute(d, order[0], order[0].path)
	// Ten seconds would be each time what closing the seeds takes; a machine that has no time for us
	// has some another time.
	took := time.Hour
	for i := 1; i < 6 && took > 8*time.Second; i++ {
		must(t, os.WriteFile(neighbours, fmt.Appendf(nil, "coap+tcp://127.0.0.1:%d\n", i), 0o600))
		begin := time.Now()
		a.substitute(d, order[i], order[i].path)
		took = time.Since(begin)
	}
	if took > 8*time.Second {
		t.Errorf("it took %v", took)
	}
	must(t, syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL))
	d.close() // which says that it was killed
}

// TestLockedDatabase substitutes items of which there are older ones, while somebody keeps the
// daemon's database locked: nothing waits for that again and again.
func TestLockedDatabase(t *testing.T) {
	a := newAheadTest(t, 0, "ahead-items = 0\n")
	db, err := newDatabase(filepath.Join(filepath.Dir(a.store), "state/db/db.sqlite"))
	must(t, err)
	defer db.Close()
	for _, item := range a.items {
		must(t, os.MkdirAll(fmt.Sprintf("%s/%s%s", a.store, strings.Repeat("a", 32), filepath.Base(item.path)[32:]), 0o755))
	}
	// take returns how long the items take of a helper that has substituted some before the database
	// is locked, if it is.
	take := func(before int, lock bool) time.Duration {
		d := a.start("substitute")
		for _, item := range a.items[:before] {
			a.substitute(d, item, item.path)
		}
		locked, err := db.Conn(t.Context())
		must(t, err)
		if lock {
			_, err = locked.ExecContext(t.Context(), "BEGIN EXCLUSIVE")
			must(t, err)
		}
		begin := time.Now()
		a.substituteRest(d)
		took := time.Since(begin)
		must(t, d.close())
		if lock {
			_, err = locked.ExecContext(t.Context(), "ROLLBACK")
		}
		must(t, errors.Join(err, locked.Close()))
		for _, item := range a.items {
			makeWritable(item.path)
			must(t, os.RemoveAll(item.path))
		}
		return took
	}
	unlocked := take(0, false)
	for before := range 2 {
		took := time.Hour
		// Half a second for each would be nine, each time.
		for try := 0; try < 5 && took > 2*unlocked+4*time.Second; try++ {
			took = take(before, true)
		}
		if took > 2*unlocked+4*time.Second {
			t.Errorf("%d items took %v, and %v without the lock", len(a.items)-before, took, unlocked)
		}
	}
}
