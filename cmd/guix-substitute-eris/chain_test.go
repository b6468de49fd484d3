// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// chain is a block store, a publisher and what a daemon needs, in a directory of their own.
type chain struct {
	t         *testing.T
	directory string
	key       *acl.SigningKey
	env       []string
	server    string            // substitute URL
	stores    map[string]string // store URL by transport
	items     []chainItem
}

type chainItem struct {
	path, hash string
	size       uint64
}

// newChain makes the keys and the configuration: blocks only, so that nothing can come from a nar,
// and no cache of them, so that everything comes from the store.
func newChain(t *testing.T) *chain {
	t.Helper()
	directory, err := os.MkdirTemp("", "chain") // short, for the socket
	must(t, err)
	t.Cleanup(func() {
		makeWritable(directory)
		os.RemoveAll(directory)
	})
	c := &chain{t: t, directory: directory, key: acl.GenerateSigningKey(), stores: map[string]string{}}
	must(t, os.Mkdir(directory+"/items", 0o755))
	writeFiles(t, directory+"/etc", map[string]string{
		"signing-key.pub": c.key.PublicKey().Text(),
		"signing-key.sec": c.key.SecretText(),
		"acl":             acl.NewACL(c.key.PublicKey()).Text(),
	})
	c.configure("policy = \"eris-only\"\ncache-size = \"0\"\n")
	c.env = append(slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "ERIS_STORE") || strings.HasPrefix(variable, "GUIX_") || strings.HasPrefix(variable, "NIX_")
	}), "GUIX_CONFIGURATION_DIRECTORY="+directory+"/etc", "GUIX_STATE_DIRECTORY="+directory+"/var",
		"HOME="+directory, "XDG_CACHE_HOME="+directory+"/cache", "GUIX_SUBSTITUTE_ERIS_SYSTEM_ROOT="+directory)
	return c
}

// configure writes the configuration file.
func (c *chain) configure(text string) {
	c.t.Helper()
	must(c.t, os.WriteFile(c.directory+"/etc/substitute-eris.toml", []byte(text), 0o600))
}

// add puts an item into the store of the publisher.
func (c *chain) add(path string, nodes nar.Nodes) {
	c.t.Helper()
	r, err := restore.Restore(c.t.Context(), nodes, c.directory+"/items/"+filepath.Base(path), restore.Options{})
	if err != nil {
		c.t.Fatalf("%s: %v", path, err)
	}
	c.items = append(c.items, chainItem{path, hashText(r.NarHash), r.NarSize})
}

// serve starts the block store and the publisher, with the given source of items.
func (c *chain) serve(items string) {
	c.t.Helper()
	store, err := startServe(c.directory, c.directory+"/serve.log", c.env, "--directory="+c.directory+"/blocks",
		"--socket="+c.directory+"/s", "--listen=coap+tcp://127.0.0.1:0", "--listen=coap://127.0.0.1:0")
	must(c.t, err)
	c.t.Cleanup(func() { must(c.t, store.stop()) })
	c.stores = map[string]string{"coap+unix": store.urls["UNIX"], "coap+tcp": store.urls["TCP"], "coap": store.urls["UDP"]}
	c.publish("--cache="+c.directory+"/cache", "--eris="+c.stores["coap+unix"], items)
}

// publish starts the publisher.
func (c *chain) publish(args ...string) {
	c.t.Helper()
	p, err := startPublish(c.directory, c.directory+"/publish.log", c.env, append(args, "--root="+c.directory+"/items")...)
	must(c.t, err)
	c.server = p.urls["HTTP"]
	c.t.Cleanup(func() { must(c.t, p.stop()) })
}

// mostMiB bounds the memory of a helper in tests. The race detector takes several times as much as
// the program, and has the most of all for itself.
var mostMiB = func() int {
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		return 1 << 10
	}
	return 64
}()

// usage is what a helper took.
type usage struct {
	memory int // the most at a time, in MiB
	cpu    time.Duration
}

// start starts a helper, as the daemon does.
func (c *chain) start(mode, store string, env ...string) *daemonHelper {
	c.t.Helper()
	env = append(slices.Concat(c.env, env), "_NIX_OPTIONS=discover=false\nsubstitute-urls="+c.server+"\n", "ERIS_STORE_URL="+store)
	d, err := startDaemonHelper(theProgram, mode, env, false)
	must(c.t, err)
	return d
}

// talk sends requests to a helper.
func (c *chain) talk(mode, store, requests string) (replies, log string, used usage) {
	c.t.Helper()
	d := c.start(mode, store)
	replies, err := d.talk(requests)
	if err := cmp.Or(err, d.close()); err != nil {
		c.t.Fatalf("%v\n%s", err, d.log.String())
	}
	state := d.cmd.ProcessState
	return replies, d.log.String(), usage{d.memory >> 20, state.UserTime() + state.SystemTime()}
}

// query asks for everything, as soon as all items have been encoded.
func (c *chain) query() {
	c.t.Helper()
	var all, want strings.Builder
	for _, item := range c.items {
		if publishedURN(c.t, c.server+"/"+filepath.Base(item.path)[:32]+".narinfo", item.hash) == "" {
			c.t.Fatalf("%s is not published", item.path)
		}
		all.WriteString(" " + item.path)
		want.WriteString(item.path + "\n")
	}
	if replies, log, _ := c.talk("query", "", "have"+all.String()+"\n"); replies != want.String()+"\n" {
		c.t.Fatalf("replies %q instead of %q\n%s", replies, want.String(), log)
	}
}

// substitute fetches everything from one store, and checks it. Where something stood still the
// store is late; then it is done again.
func (c *chain) substitute(store string) {
	c.t.Helper()
	destination := c.directory + "/got"
	var requests, want strings.Builder
	for i, item := range c.items {
		fmt.Fprintf(&requests, "substitute %s %s/%d\n", item.path, destination, i)
		fmt.Fprintf(&want, "success %s %d\n", item.hash, item.size)
	}
	var replies, log string
	var used usage
	n := 0
	repeat(func() bool {
		must(c.t, errors.Join(restore.Remove(destination), os.Mkdir(destination, 0o755)))
		replies, log, used = c.talk("substitute", store, requests.String())
		n = strings.Count(log, "Downloading urn:eris:")
		return (replies != want.String() || n != len(c.items)) && strings.Contains(log, saysLate)
	})
	if replies != want.String() {
		c.t.Errorf("%s: replies %q instead of %q\n%s", store, replies, want.String(), log)
	}
	if n != len(c.items) {
		c.t.Errorf("%d of %d items were downloaded from blocks\n%s", n, len(c.items), log)
	}
	c.t.Logf("%s: %d MiB at most in memory, %v of processor", store, used.memory, used.cpu)
	if used.memory > mostMiB {
		c.t.Errorf("%s: %d MiB in memory", store, used.memory)
	}
	for i, item := range c.items {
		checkTree(c.t, fmt.Sprintf("%s/%d", destination, i), item.hash)
	}
	must(c.t, restore.Remove(destination))
}

// manifest is what the publisher is told about the items.
func (c *chain) manifest() string {
	c.t.Helper()
	var b strings.Builder
	for _, item := range c.items {
		fmt.Fprintf(&b, "StorePath: %s\nReferences: \nNarHash: %s\nNarSize: %d\n\n", item.path, item.hash, item.size)
	}
	must(c.t, os.WriteFile(c.directory+"/manifest", []byte(b.String()), 0o644))
	return "--manifest=" + c.directory + "/manifest"
}

// addMirror adds items that "guix publish" has published.
func (c *chain) addMirror() {
	c.t.Helper()
	names, err := filepath.Glob("../../testdata/guix-mirror/all/*.narinfo")
	if err != nil || len(names) < 20 {
		c.t.Fatalf("narinfos %v, error %v", names, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		must(c.t, err)
		n, err := narinfo.Parse(text)
		must(c.t, err)
		if n.NarSize > 1e6 {
			continue // which has 5000 files
		}
		f, err := os.Open("../../testdata/guix-mirror/nar/gzip/" + filepath.Base(n.StorePath))
		must(c.t, err)
		plain, err := decompress.Open("gzip", f)
		must(c.t, err)
		c.add(n.StorePath, nar.NewReader(nar.NewReadAhead(c.t.Context(), plain, 32, 1<<16, 0)))
		plain.Close()
		must(c.t, f.Close())
		if item := c.items[len(c.items)-1]; item.hash != n.NarHash {
			c.t.Fatalf("%s: hash %s instead of %s", item.path, item.hash, n.NarHash)
		}
	}
}

// generated is an item that is generated: a tree in a new directory.
func (c *chain) generated(name string, generate func(root string)) {
	c.t.Helper()
	root := c.directory + "/tree"
	generate(root)
	tree := nar.NewTree(root)
	defer tree.Close()
	c.add(fmt.Sprintf("/gnu/store/%032d-%s", len(c.items), name), tree)
	must(c.t, restore.Remove(root))
}

// pseudorandom writes a file of the given size.
func (c *chain) pseudorandom(path string, random *rand.ChaCha8, size int64) {
	c.t.Helper()
	must(c.t, os.MkdirAll(filepath.Dir(path), 0o755))
	f, err := os.Create(path)
	must(c.t, err)
	_, err = io.CopyN(f, random, size)
	must(c.t, errors.Join(err, f.Close()))
}

// TestChainLarge takes items that are large in one way or another, and such as Guix has, through
// everything: encoded, stored, published, queried, and substituted over each transport. With
// ERIS_BIG_TESTS=1 they are larger than all memory that a helper may have, and have as many files
// and levels as occur; with "all" they are as large as occurs, and come by each transport.
func TestChainLarge(t *testing.T) {
	t.Parallel()
	setting := os.Getenv("ERIS_BIG_TESTS")
	big, all := setting != "", setting == "all"
	size, files, depth, zeros := int64(8<<20), 500, 400, int64(64<<20)
	if big {
		size, files, depth, zeros = 100e6, 20000, nar.MaxDepth, 256<<20
	}
	if all {
		size, zeros = 1e9, 1<<30
	}
	c := newChain(t)
	random := rand.NewChaCha8([32]byte{1})
	c.generated("one-file", func(root string) { c.pseudorandom(root, random, size) })
	c.generated("files", func(root string) {
		for i := range files {
			most := uint64(4 << 10)
			if i%8 == 0 {
				most = 40 << 10
			}
			c.pseudorandom(fmt.Sprintf("%s/%d/%d/%d", root, i%10, i%100, i), random, int64(random.Uint64()%(most+1)))
		}
	})
	c.generated("deep", func(root string) {
		writeFiles(t, root, map[string]string{strings.Repeat("d/", depth-1) + "f": strings.Repeat("deep", 1000)})
	})
	c.generated("zeros", func(root string) {
		must(t, errors.Join(os.WriteFile(root, nil, 0o644), os.Truncate(root, zeros)))
	})
	c.addMirror()
	c.serve(c.manifest())
	c.query()
	c.substitute("coap+unix:///nonexistent/s " + c.stores["coap+unix"]) // a store that is not there does no harm
	if !big || all {
		c.substitute(c.stores["coap+tcp"])
	}
	if big {
		c.items = c.items[1:] // a datagram has a thirty-second of a block: 1 GB is too much
	}
	if big && !all {
		c.items = c.items[1:2] // the deep one
	}
	c.substitute(c.stores["coap"])
}

// TestWalkthrough runs what docs/walkthrough.md tells people to run.
func TestWalkthrough(t *testing.T) {
	for _, program := range []string{"bash", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not there", program)
		}
	}
	script, err := shellBlocks("walkthrough.md", "sh")
	must(t, err)
	c := newChain(t)
	must(t, os.Remove(c.directory+"/etc/substitute-eris.toml"))
	// Another server may be at the port that people are told to use.
	_, port, _ := net.SplitHostPort(testhelp.FreeAddress())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", strings.ReplaceAll(script, ":8181", ":"+port))
	cmd.Dir, cmd.Env = c.directory, c.env
	// Servers that a step has left behind end with the group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	log, err := os.Create(c.directory + "/output")
	must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	if cmd.Process != nil {
		group := cmd.Process.Pid
		unix.Kill(-group, unix.SIGKILL)
		// It may take a moment until those are gone whose parent was killed.
		eventually(t, "processes are left", func() bool { return unix.Kill(-group, 0) != nil })
	}
	if err != nil {
		output, _ := os.ReadFile(log.Name())
		t.Errorf("%v\n%s", err, output)
	}
}
