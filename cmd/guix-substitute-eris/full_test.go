// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// fullTest is what is tried on disks that become full: an item, and where it comes from.
type fullTest struct {
	*chain
	t       *testing.T
	between int    // pages between two attempts
	small   string // where the small disk is, and the store
	urn     string
	scheme  string // of the store that helpers use; empty is TCP
}

// TestFullDisks has the disk be full at every page, and at every file, that something writes: a
// helper that restores, one that keeps what it learns, serve, publish, encode, decode and export.
// All of it fails with nothing half-made, or does without, and works once there is room. ERIS_FULL
// is how many pages there are between two attempts.
func TestFullDisks(t *testing.T) {
	between := soakRuns(t, "ERIS_FULL", 17)
	if between < 1 {
		t.Skip("ERIS_FULL leaves it out")
	}
	c := newChain(t)
	f := &fullTest{chain: c, t: t, between: between, small: c.directory + "/small"}
	must(t, os.Mkdir(f.small, 0o755))
	if err := f.mount("size=1m"); err != nil {
		t.Skip("cannot mount a small file system (this needs root): ", err)
	}
	f.unmount()
	c.env = append(c.env, "NIX_STORE_DIR="+f.small)
	c.configure("")
	tree := c.directory + "/tree"
	for i, size := range []int{0, 1, 5000, 5000, 40000, 90000} {
		directory := fmt.Sprintf("%s/%d", tree, i%3)
		must(t, os.MkdirAll(directory+"/empty", 0o755))
		writeFiles(t, directory, map[string][]byte{fmt.Sprint(i): noise(uint64(size), size)})
	}
	must(t, os.Symlink("2/5", tree+"/link"))
	nodes := nar.NewTree(tree)
	defer nodes.Close()
	c.add(f.small+"/00000000000000000000000000000000-item", nodes)
	c.serve(c.manifest())
	c.query()
	f.urn = publishedURN(t, f.narinfo(), c.items[0].hash)
	for name, use := range map[string]func(t *testing.T) bool{
		"restore": f.restores, "state": f.keeps, "seeds": f.seeds, "decode": f.decodes, "export": f.exports, "encode": f.encodes,
		"serve": f.serves, "publish": f.publishes,
	} {
		t.Run(name, func(t *testing.T) { f.limits(t, use) })
	}
}

// limits tries something with more and more room, until that is enough.
func (f *fullTest) limits(t *testing.T, use func(t *testing.T) bool) {
	full := 0
	for kind, step := range map[string]int{"size=%d,nr_inodes=10000": f.between * os.Getpagesize(), "size=64m,nr_inodes=%d": (f.between + 3) / 4} {
		for n, whole := step, false; !whole; n += step {
			must(t, f.mount(fmt.Sprintf(kind, n)))
			whole = use(t)
			f.unmount()
			if !whole {
				full++
			}
			if t.Failed() || full == 10000 {
				t.Fatalf("failed with "+kind, n)
			}
		}
	}
	if t.Logf("%d disks were full", full); full == 0 {
		t.Error("no disk was full")
	}
}

func (f *fullTest) mount(options string) error {
	return unix.Mount("tmpfs", f.small, "tmpfs", 0, options+",mode=755")
}

// room makes room.
func (f *fullTest) room() {
	must(f.t, unix.Mount("", f.small, "", unix.MS_REMOUNT, "size=64m,nr_inodes=10000"))
}

func (f *fullTest) unmount() {
	must(f.t, unix.Unmount(f.small, unix.MNT_DETACH))
}

func (f *fullTest) narinfo() string {
	return f.server + "/" + filepath.Base(f.items[0].path)[:32] + ".narinfo"
}

// noSpace is what the system says.
const noSpace = "no space left on device"

// fullDisk are the reasons for which something may fail: that, what export finds out beforehand,
// and what a server says that has logged the reason.
var fullDisk = regexp.MustCompile(noSpace + "|has too little room|peer answers 5.00")

// run runs the program. When it fails it must say why.
func (f *fullTest) run(t *testing.T, args ...string) (stdout string, ok bool) {
	t.Helper()
	cmd := exec.Command("guix-substitute-eris", args...)
	cmd.Env, cmd.Dir = f.env, f.directory
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil && (cmd.ProcessState.ExitCode() != 1 || !fullDisk.MatchString(stderr.String())) {
		t.Errorf("%q: %v\n%s", args, err, stderr.String())
	}
	return string(out), err == nil
}

// right checks a tree against the item.
func (f *fullTest) right(t *testing.T, path string) {
	t.Helper()
	checkTree(t, path, f.items[0].hash)
}

// only checks that nothing is in the small disk but what has these names.
func (f *fullTest) only(t *testing.T, names string) {
	t.Helper()
	filepath.WalkDir(f.small, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != f.small && !strings.Contains(names, d.Name()) {
			t.Errorf("%s is left", path)
		}
		if err == nil && d.IsDir() && d.Name() == ".links" {
			return fs.SkipDir
		}
		return err
	})
}

// helper starts a helper that keeps what it learns below a directory.
func (f *fullTest) helper(t *testing.T, mode, state string) *soakHelper {
	t.Helper()
	d := f.start(mode, f.stores[cmp.Or(f.scheme, "coap+tcp")], "XDG_CACHE_HOME="+state)
	return &soakHelper{d, &soakRun{t: t, what: mode}, mode, -1}
}

// ask has a helper answer, which it does whatever happens.
func (f *fullTest) ask(t *testing.T, h *soakHelper, request string) string {
	t.Helper()
	reply, err := h.ask(request)
	if err != nil {
		t.Errorf("%q: %v", request, err)
	}
	return reply
}

// success is the reply to a substitution that has gone well.
func (f *fullTest) success() string {
	return fmt.Sprintf("success %s %d\n", f.items[0].hash, f.items[0].size)
}

// restores restores the item into a store on the small disk.
func (f *fullTest) restores(t *testing.T) bool {
	path := f.items[0].path
	h := f.helper(t, "substitute", f.directory+"/state")
	request := "substitute " + path + " " + path
	first := f.ask(t, h, request)
	whole := first == f.success()
	if !whole {
		if first != "not-found\n" {
			t.Errorf("the reply is %q", first)
		}
		f.only(t, ".links")
		f.room()
		if again := f.ask(t, h, request); again != f.success() {
			t.Errorf("the reply is %q, with room", again)
		}
	}
	f.right(t, path)
	h.finish()
	if !whole && !strings.Contains(h.log.String(), noSpace) {
		t.Errorf("it is not said why:\n%s", h.log.String())
	}
	return whole
}

// keeps has what helpers keep for later on the small disk: that it is full does no harm.
func (f *fullTest) keeps(t *testing.T) bool {
	path, got := f.items[0].path, f.directory+"/got"
	said := ""
	for mode, request := range map[string]string{"query": "info " + path, "substitute": "substitute " + path + " " + got} {
		h := f.helper(t, mode, f.small+"/state")
		if reply := f.ask(t, h, request); reply != f.success() && !strings.HasPrefix(reply, path+"\n") {
			t.Errorf("the reply is %q", reply)
		}
		h.finish()
		said += h.log.String()
	}
	f.right(t, got)
	must(t, restore.Remove(got))
	return !strings.Contains(said, noSpace)
}

// seeds is keeps with nars that are copied for the block store.
func (f *fullTest) seeds(t *testing.T) bool {
	f.configure("policy = \"http-first\"\nseed-nars = true\n")
	f.scheme = "coap+unix"
	defer func() {
		f.configure("")
		f.scheme = ""
	}()
	whole := f.keeps(t)
	left, _ := filepath.Glob(f.small + "/state/guix/substitute-eris/seeds/*")
	if _, err := os.Stat(f.small + "/state/guix/substitute-eris/seeds"); len(left) > 0 || whole && err != nil {
		t.Errorf("%q are left, error %v", left, err)
	}
	return whole
}

// again runs the program on the full disk, and again with room if that fails; then no file has one
// of the names.
func (f *fullTest) again(t *testing.T, absent string, args ...string) (stdout string, whole bool) {
	t.Helper()
	stdout, whole = f.run(t, args...)
	if whole {
		return stdout, true
	}
	if found, _ := filepath.Glob(f.small + "/" + absent); len(found) > 0 || strings.Contains(stdout, "urn:") {
		t.Errorf("after a failure there are %q, and it said %q", found, stdout)
	}
	f.room()
	stdout, ok := f.run(t, args...)
	if !ok {
		t.Error("it fails with room")
	}
	return stdout, false
}

func (f *fullTest) decodes(t *testing.T) bool {
	_, whole := f.again(t, "*", "decode", "--store="+f.stores["coap+unix"], f.urn, f.small+"/out")
	f.right(t, f.small+"/out")
	f.only(t, "out 0 1 2 3 4 5 link empty")
	return whole
}

func (f *fullTest) exports(t *testing.T) bool {
	_, whole := f.again(t, "stick/n*", "export", f.items[0].path, "--to="+f.small+"/stick", "--root="+f.directory+"/items",
		"--substitute-urls="+f.server)
	f.decoded(t, "file:"+f.small+"/stick/blocks", f.urn)
	if text, err := os.ReadFile(f.small + "/stick/00000000000000000000000000000000.narinfo"); err != nil || !bytes.Contains(text, []byte(f.urn)) {
		t.Errorf("%q, error %v", text, err)
	}
	return whole
}

func (f *fullTest) encodes(t *testing.T) bool {
	urn, whole := f.again(t, "no", "encode", "--store=file:"+f.small+"/blocks", "items/"+filepath.Base(f.items[0].path))
	f.decoded(t, "file:"+f.small+"/blocks", strings.TrimSpace(urn))
	return whole
}

// decoded checks that the item can be decoded.
func (f *fullTest) decoded(t *testing.T, store, urn string) {
	t.Helper()
	if _, ok := f.run(t, "decode", "--store="+store, urn, "decoded"); ok {
		f.right(t, f.directory+"/decoded")
	}
	must(t, restore.Remove(f.directory+"/decoded"))
}

// serves has a store on the small disk, into which the item is encoded.
func (f *fullTest) serves(t *testing.T) bool {
	log := f.directory + "/full.log"
	start := func() *process {
		server, err := startServe(f.directory, log, f.env, "--directory="+f.small+"/blocks", "--socket="+f.directory+"/full")
		if text, _ := os.ReadFile(log); err != nil && !bytes.Contains(text, []byte(noSpace)) {
			t.Fatalf("%v\n%s", err, text)
		}
		return server
	}
	server := start()
	whole := server != nil
	if whole {
		_, whole = f.again(t, "no", "encode", "--store="+server.urls["UNIX"], "items/"+filepath.Base(f.items[0].path))
		// One of several batches that fail at the same time is logged, perhaps after others are answered.
		eventually(t, "the log does not say why", func() bool {
			text, err := os.ReadFile(log)
			return err == nil && (whole || bytes.Contains(text, []byte(noSpace)))
		})
		server.end()
	}
	if !whole {
		f.room()
	}
	if server = start(); server == nil {
		t.Fatalf("it does not start again; %v", whole)
	}
	defer server.end()
	if whole {
		f.decoded(t, server.urls["UNIX"], f.urn)
		f.room()
	}
	if _, ok := f.run(t, "encode", "--store="+server.urls["UNIX"], "items/"+filepath.Base(f.items[0].path)); !ok {
		t.Error("it takes nothing with room")
	}
	f.decoded(t, server.urls["UNIX"], f.urn)
	return whole
}

// publishes keeps read capabilities on the small disk.
func (f *fullTest) publishes(t *testing.T) bool {
	said, log := "", f.directory+"/publish.log"
	for range 2 {
		p, err := startPublish(f.directory, log, f.env, "--cache="+f.small+"/cache", "--eris="+f.stores["coap+unix"], f.manifest(), "--root="+f.directory+"/items")
		if err == nil {
			if urn := publishedURN(t, p.urls["HTTP"]+"/"+filepath.Base(f.narinfo()), f.items[0].hash); urn != f.urn {
				t.Errorf("published: %q", urn)
			}
			must(t, p.stop())
		}
		text, _ := os.ReadFile(log)
		if said += string(text); err != nil {
			if !strings.Contains(said, noSpace) {
				t.Fatalf("%v\n%q", err, said)
			}
			f.room()
		}
	}
	return !strings.Contains(said, noSpace)
}
