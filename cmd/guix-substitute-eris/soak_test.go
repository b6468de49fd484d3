// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// soakRuns returns how many schedules or kills there are: some, or as many as "make soak" says.
func soakRuns(t *testing.T, variable string, usual int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// kills is how often something is killed that is killed so many times usually.
func kills(t *testing.T, usual int) int { return soakRuns(t, "ERIS_KILLS", usual) }

// soakItem is an item that each schedule has in a store of its own.
type soakItem struct {
	name       string
	references []int // to earlier items
	archive    []byte
	zstd       []byte
	hash       [sha256.Size]byte
	capability eris.ReadCapability
}

// soak is what all schedules have in common.
type soak struct {
	stalls atomic.Int64 // of the machine
	items  []*soakItem
	blocks *blockstore.Store
	key    *acl.SigningKey
}

// newSoak makes items of several sizes, which refer to each other, and their blocks.
func newSoak(t *testing.T) *soak {
	s := &soak{key: acl.GenerateSigningKey()}
	var err error
	s.blocks, err = blockstore.Open(t.TempDir()+"/blocks", blockstore.Options{})
	must(t, err)
	t.Cleanup(func() { s.blocks.Close() })
	var wait sync.WaitGroup
	wait.Go(func() { s.watch(t.Context()) })
	t.Cleanup(wait.Wait)
	compressor, err := zstd.NewWriter(nil)
	must(t, err)
	defer compressor.Close()
	random := rand.New(rand.NewPCG(5, 6))
	for i, size := range []int{100, 900, 4000, 30000, 70000, 200000, 500000, 2 << 20} {
		item := &soakItem{name: fmt.Sprintf("%032d-item%d", i, random.IntN(100))}
		item.references = random.Perm(i)[:min(i, 3)]
		tree := t.TempDir() + "/tree"
		large := noise(uint64(i), size)
		copy(large[size/2:], large[:size/2]) // compressible
		writeFiles(t, tree, map[string][]byte{"lib/file": large, "lib/same": noise(0, 10000), "lib/name": []byte(item.name)})
		must(t, os.Mkdir(tree+"/lib/empty", 0o755))
		must(t, os.Symlink("lib/file", tree+"/link"))
		encoding, err := publish.Encode(t.Context(), tree, s.blocks.Put, erisfs.EncodeOptions{})
		must(t, err)
		item.archive, item.hash, item.capability = archiveOf(t, tree), encoding.NarHash, encoding.Capability
		item.zstd = compressor.EncodeAll(item.archive, nil)
		s.items = append(s.items, item)
	}
	return s
}

// watch counts when nothing has run for a while. What has a time limit says nothing then.
func (s *soak) watch(ctx context.Context) {
	const tick, most = 50 * time.Millisecond, time.Second
	for last := time.Now(); ctx.Err() == nil; last = time.Now() {
		if time.Sleep(tick); time.Since(last) > most {
			s.stalls.Add(1)
		}
	}
}

// repeat runs something again in which a good source was not good enough, if the machine stood
// still meanwhile.
func (s *soak) repeat(t *testing.T, seed uint64, run func(r *soakRun)) {
	for {
		stalls := s.stalls.Load()
		r := s.newRun(t, seed)
		run(r)
		r.close()
		t.Logf("%s: %d restored, %v at most", r.what, r.restored, r.longest)
		if len(r.late) == 0 {
			return
		}
		if stalls == s.stalls.Load() {
			t.Errorf("%s: %s", r.what, strings.Join(r.late, "\n"))
			return
		}
	}
}

// soakRun is one schedule: a machine with a daemon, which this process plays, and its sources.
type soakRun struct {
	*soak
	t        *testing.T
	random   *rand.Rand
	seed     uint64
	good     bool // there is a source without faults for whatever is asked for
	store    string
	env      []string
	end      chan struct{}
	wait     sync.WaitGroup
	closers  []func()
	close    func()
	narinfos map[string]string // by the name of the file
	what     string            // of this schedule, for messages
	program  string            // that is run as a helper
	// otherSession is the same, as the child of another process: of a daemon's process for another
	// client.
	otherSession string
	late         []string // what a good source should have done
	restored     int
	longest      time.Duration // that a request took
}

// newRun draws a schedule. Sources are substitute servers, stores of blocks, or both; those without
// faults are drawn as well.
func (s *soak) newRun(t *testing.T, seed uint64) *soakRun {
	t.Helper()
	r := &soakRun{soak: s, t: t, seed: seed, random: rand.New(rand.NewPCG(seed, 1)), end: make(chan struct{}), narinfos: map[string]string{}, program: theProgram}
	directory, err := os.MkdirTemp("", "soak") // short, for sockets
	must(t, err)
	r.close = sync.OnceFunc(func() {
		close(r.end)
		for _, f := range r.closers {
			f()
		}
		r.wait.Wait()
		must(t, restore.Remove(directory))
	})
	t.Cleanup(r.close)
	r.store, r.otherSession = directory+"/store", directory+"/helper"
	must(t, os.WriteFile(r.otherSession, []byte("#!/bin/sh\n"+r.program+" \"$@\"\nexit $?\n"), 0o755))
	r.sign()
	mode := []string{"http", "coap", "both"}[seed%3]
	policies := []string{"fastest", "eris-first", "http-first"}
	if mode == "coap" {
		policies = append(policies, "eris-only")
	}
	policy := policies[r.random.IntN(len(policies))]
	r.good = r.random.IntN(4) > 0
	var servers, stores []*faults
	for range 1 + r.random.IntN(3) {
		servers = append(servers, r.faults(serverFaults, mode != "coap"))
	}
	if r.good && mode != "coap" || r.random.IntN(3) == 0 {
		servers = append(servers, r.faults(serverFaults, !r.good))
	}
	if mode != "http" {
		for range 1 + r.random.IntN(3) {
			stores = append(stores, r.faults(storeFaults, true))
		}
		if r.good && policy == "eris-only" || r.random.IntN(3) == 0 {
			stores = append(stores, r.faults(storeFaults, !r.good))
		}
	}
	var addresses, urls []string
	for _, f := range servers {
		addresses = append(addresses, r.serve(f))
	}
	for i, f := range stores {
		urls = append(urls, r.serveBlocks(f, directory, i))
	}
	if r.random.IntN(6) == 0 { // what is not there, in front
		urls = append([]string{"coap+tcp://" + testhelp.FreeAddress()}, urls...)
		addresses = append(addresses, "http://"+testhelp.FreeAddress())
	}
	for _, all := range [][]string{addresses, urls} {
		r.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	}
	cacheSize := []string{"0", "1GiB"}[r.random.IntN(2)]
	r.what = fmt.Sprintf("seed %d: %s, policy %s, good %v, cache %s, %d servers, %d stores", seed, mode, policy, r.good, cacheSize, len(addresses), len(urls))
	writeFiles(t, directory+"/etc", map[string]string{
		"acl":                  acl.NewACL(s.key.PublicKey()).Text(),
		"substitute-eris.toml": fmt.Sprintf("policy = %q\ncache-size = %q\nseed-nars = %v\nverbose = true\n", policy, cacheSize, seed/3%2 == 1),
	})
	r.env = append(machineEnvironment(t, directory, "substitute-urls="+strings.Join(addresses, " ")+"\n"), "ERIS_STORE_URL="+strings.Join(urls, " "))
	return r
}

// faults draws the faults of one source. With nothing to fall back to they do not last.
func (r *soakRun) faults(more []fault, faulty bool) *faults {
	f := &faults{seed: r.random.Uint64(), end: r.end}
	if !faulty {
		return f
	}
	all := slices.Concat(shortFaults, more)
	f.share = 0.1 + r.random.Float64()*0.4
	if r.good {
		all = append(all, lastingFaults...)
		f.share = min(1, 0.1+r.random.Float64()*1.2)
	}
	r.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	f.kinds = all[:1+r.random.IntN(4)]
	return f
}

func (r *soakRun) listen(network, address string) net.Listener {
	r.t.Helper()
	l, err := net.Listen(network, address)
	must(r.t, err)
	return l
}

// serve starts a substitute server, and returns its URL.
func (r *soakRun) serve(f *faults) string {
	l := r.listen("tcp", "127.0.0.1:0")
	files := map[string][]byte{}
	for _, item := range r.items {
		files["/nar/"+item.name], files["/nar/zstd/"+item.name] = item.archive, item.zstd
	}
	resumable := r.random.IntN(2) == 0
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body := files[q.URL.Path]
		if text := r.narinfos[q.URL.Path]; text != "" {
			body = []byte(text)
		} else if body == nil {
			http.NotFound(w, q)
			return
		}
		f.respond(w, q, body, func() {
			if resumable {
				w.Header().Set("ETag", `"same"`)
				http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(body))
			} else {
				w.Write(body)
			}
		})
	})}
	r.wait.Go(func() { server.Serve(faultyListener{l, f}) })
	r.closers = append(r.closers, func() { server.Close() })
	return "http://" + l.Addr().String()
}

// serveBlocks starts a block store, and returns its URL.
func (r *soakRun) serveBlocks(f *faults, directory string, i int) string {
	store := faultyStore(r.blocks, f)
	server := coapserver.New(coapserver.Config{Source: store, Sink: r.blocks})
	url, l := "", net.Listener(nil)
	if r.random.IntN(2) == 0 {
		l = r.listen("tcp", "127.0.0.1:0")
		url = "coap+tcp://" + l.Addr().String()
	} else {
		path := fmt.Sprintf("%s/%d", directory, i)
		l = r.listen("unix", path)
		url = "coap+unix://" + path
	}
	r.wait.Go(func() { server.Serve(faultyListener{l, f}, coapserver.Access{Get: true, Put: true}) })
	r.closers = append(r.closers, func() {
		l.Close()
		server.Close()
		store.Close()
	})
	return url
}

// sign makes the narinfos of the items in this run's store.
func (r *soakRun) sign() {
	r.t.Helper()
	for _, item := range r.items {
		n := &narinfo.Narinfo{
			StorePath: r.store + "/" + item.name, NarDigest: item.hash, NarSize: uint64(len(item.archive)),
			ERIS: []narinfo.ERIS{{URN: item.capability.URN()}},
		}
		for _, k := range item.references {
			n.References = append(n.References, r.items[k].name)
		}
		urls := []narinfo.URL{
			{URL: "nar/zstd/" + item.name, Compression: "zstd", FileSize: uint64(len(item.zstd)), SizeKnown: r.random.IntN(2) == 0},
			{URL: "nar/" + item.name, Compression: "none"},
		}
		r.narinfos["/"+item.name[:32]+".narinfo"] = signedNarinfo(r.t, r.key, n, urls[r.random.IntN(2):]...)
	}
}

const (
	// mostTime is what a request may take while there is a good source.
	mostTime = 30 * time.Second
	// hungTime is when a helper is taken to hang, whatever its sources do.
	hungTime = 3 * time.Minute
)

// soakHelper is a helper, in the hands of the daemon.
type soakHelper struct {
	*daemonHelper
	r    *soakRun
	mode string
	left int // requests until it is killed, if it is not negative
}

func (r *soakRun) start(mode string) *soakHelper {
	r.t.Helper()
	d, err := startDaemonHelper(r.program, mode, r.env, false)
	must(r.t, err)
	return &soakHelper{d, r, mode, -1}
}

// ask sends a request and returns the whole reply.
func (h *soakHelper) ask(request string) (string, error) {
	if h.left == 0 {
		time.AfterFunc(time.Duration(h.r.random.IntN(20000))*time.Microsecond, func() { h.cmd.Process.Kill() })
	}
	h.left--
	begin := time.Now()
	h.replies.SetReadDeadline(begin.Add(hungTime))
	reply, err := h.daemonHelper.ask(request + "\n")
	if errors.Is(err, os.ErrDeadlineExceeded) {
		h.cmd.Process.Signal(syscall.SIGQUIT)
		h.close()
		h.r.t.Fatalf("%s: no reply to %q\n%s", h.r.what, request, h.log.String())
	} else if err != nil {
		return reply, err
	}
	took := time.Since(begin)
	h.r.longest = max(h.r.longest, took)
	if h.r.good && took > mostTime {
		h.r.late = append(h.r.late, fmt.Sprintf("%q took %v", request, took))
	}
	return reply, nil
}

// foreign are messages that are not the program's: those of packages, with a date, and of faults.
var foreign = regexp.MustCompile(`^\d{4}/\d\d/\d\d |^panic: |^fatal error: |internal error: `)

// finish ends a helper, which must be there still.
func (h *soakHelper) finish() {
	if err := h.close(); err != nil {
		h.r.t.Errorf("%s: %s helper: %v", h.r.what, h.mode, err)
	}
	for line := range strings.Lines(h.log.String()) {
		if foreign.MatchString(line) {
			h.r.t.Errorf("%s: the %s helper says %q", h.r.what, h.mode, line)
		}
	}
	if h.r.t.Failed() || len(h.r.late) > 0 {
		h.r.t.Logf("%s: %s helper:\n%s", h.r.what, h.mode, h.log.String())
	}
}

// check checks the reply to a request to substitute an item, and what is there.
func (r *soakRun) check(item *soakItem, reply string) {
	path := r.store + "/" + item.name
	want := fmt.Sprintf("success %s %d\n", hashText(item.hash), len(item.archive))
	if !strings.HasPrefix(reply, "success") {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			r.t.Errorf("%s: the reply is %q, and %s is there (%v)", r.what, reply, path, err)
		}
		if reply != "not-found\n" && !strings.HasPrefix(reply, "hash-mismatch sha256 ") {
			r.t.Errorf("%s: %s: the reply is %q", r.what, item.name, reply)
		} else if r.good {
			r.late = append(r.late, fmt.Sprintf("%s: the reply is %q", item.name, reply))
		}
		return
	}
	r.restored++
	if sum, _, err := nar.HashTree(r.t.Context(), path); err != nil || sum != item.hash || reply != want {
		r.t.Errorf("%s: %s: the reply is %q, and the hash is %x (%v)", r.what, item.name, reply, sum, err)
	}
}

// checkStore checks that nothing is in the store but items and links.
func (r *soakRun) checkStore() {
	entries, err := os.ReadDir(r.store)
	must(r.t, err)
	for _, e := range entries {
		if e.Name() != ".links" && !slices.ContainsFunc(r.items, func(i *soakItem) bool { return i.name == e.Name() }) {
			r.t.Errorf("%s: %s is left", r.what, e.Name())
		}
	}
}

// info asks about each item on its own, as the daemon does before it substitutes them.
func (r *soakRun) info(h *soakHelper) error {
	for i := len(r.items) - 1; i >= 0; i-- {
		path := r.store + "/" + r.items[i].name
		reply, err := h.ask("info " + path)
		if err != nil {
			return err
		}
		if offered := strings.HasPrefix(reply, path+"\n"); !offered && reply != "\n" {
			r.t.Errorf("%s: the reply about %s is %q", r.what, path, reply)
		} else if r.good && !offered {
			r.late = append(r.late, fmt.Sprintf("%s is not offered", path))
		}
	}
	return nil
}

// substitute substitutes all items.
func (r *soakRun) substitute(h *soakHelper) error {
	for _, item := range r.items {
		path := r.store + "/" + item.name
		// The daemon deletes what is not valid.
		if err := restore.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.t.Fatal(err)
		}
		reply, err := h.ask("substitute " + path + " " + path)
		if err != nil {
			return fmt.Errorf("%s: %w", item.name, err)
		}
		r.check(item, reply)
	}
	return nil
}

// TestSoak has schedules of faults: every item is restored right or refused, and nothing is left.
// ERIS_SOAK says how many schedules there are; one of them is repeated by -run 'TestSoak/^SEED$'.
func TestSoak(t *testing.T) {
	s := newSoak(t)
	t.Run("all", func(t *testing.T) {
		for seed := range uint64(soakRuns(t, "ERIS_SOAK", 18)) {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				s.repeat(t, seed, func(r *soakRun) {
					query := r.start("query")
					if err := r.info(query); err != nil {
						t.Errorf("%s: %v", r.what, err)
					}
					h := r.start("substitute")
					if err := r.substitute(h); err != nil {
						t.Errorf("%s: %v", r.what, err)
					}
					query.finish()
					h.finish()
					r.checkStore()
				})
			})
		}
	})
}

// helperKills is how often helpers are killed in a run: the query helper once, the other one the
// other times.
const helperKills = 4

// TestHelperKilled kills helpers at any time, while there may be faults, too. Those that are
// started in their place do all that is left, and remove what the others have left.
func TestHelperKilled(t *testing.T) {
	s := newSoak(t)
	t.Run("all", func(t *testing.T) {
		for i := range uint64(kills(t, 8)+helperKills-1) / helperKills {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				s.repeat(t, 1000000+i, func(r *soakRun) {
					for mode, left := 0, helperKills; mode < 2; mode++ {
						for !r.killed(mode, &left) {
						}
					}
					r.checkStore()
				})
			})
		}
	})
}

// killed runs a helper, the first or the second one of a daemon, and kills it if it is to be. It
// returns true once all has been done.
func (r *soakRun) killed(mode int, left *int) bool {
	name := []string{"query", "substitute"}[mode]
	kill := *left > 0 && (mode == 1 || *left == helperKills)
	if !kill && mode == 1 && r.random.IntN(2) == 0 {
		r.program = r.otherSession
	}
	h := r.start(name)
	if kill {
		*left--
		h.left = r.random.IntN(3)
	}
	err := error(nil)
	if mode == 0 {
		err = r.info(h)
	} else {
		err = r.substitute(h)
	}
	if !kill {
		if err != nil {
			r.t.Errorf("%s: %v", r.what, err)
		}
		h.finish()
		return true
	}
	h.cmd.Process.Kill()
	h.close()
	return false
}

// TestPublishKilled kills a publisher while it encodes an item that several clients ask for. What
// it has said of the item holds: its blocks are in the store, and the next publisher says the same.
func TestPublishKilled(t *testing.T) {
	c := newChain(t)
	store, err := startServe(c.directory, c.directory+"/serve.log", c.env, "--directory="+c.directory+"/blocks", "--socket="+c.directory+"/s")
	must(t, err)
	t.Cleanup(store.end)
	random := rand.New(rand.NewPCG(7, 8))
	said := map[string]string{} // URNs by URL
	for i := range kills(t, 3) + 1 {
		c.generated("item", func(root string) {
			must(t, os.WriteFile(root, noise(uint64(i), 1+random.IntN(2<<20)), 0o644))
		})
		// Nobody else may answer in its place.
		publisher, err := startPublish(c.directory, c.directory+"/publish.log", c.env, "--listen="+testhelp.FreeAddress(), "--root="+c.directory+"/items",
			"--cache="+c.directory+"/cache", "--eris="+store.urls["UNIX"], c.manifest())
		must(t, err)
		// The last one is not killed, and says everything once more.
		items := c.items[max(0, i-1):]
		if i == kills(t, 3) {
			items = c.items
		} else {
			time.AfterFunc(time.Duration(random.IntN(60))*time.Millisecond, func() { publisher.cmd.Process.Kill() })
		}
		var urns sync.Map
		var group errgroup.Group
		group.SetLimit(64) // far below the connections that a publisher takes from one host
		for _, item := range slices.Concat(items, items) {
			group.Go(func() error {
				path := "/" + filepath.Base(item.path)[:32] + ".narinfo"
				if urn := publishedURN(t, publisher.urls["HTTP"]+path, item.hash); urn != "" {
					urns.Store(path, urn)
				}
				return nil
			})
		}
		group.Wait()
		if i == kills(t, 3) {
			must(t, publisher.stop())
		} else {
			publisher.end()
		}
		urns.Range(func(path, urn any) bool {
			if before := said[path.(string)]; before != "" && before != urn {
				t.Errorf("%s: %s, and %s before", path, urn, before)
			}
			said[path.(string)] = urn.(string)
			if text, err := exec.Command("guix-substitute-eris", "decode", "--store="+store.urls["UNIX"], urn.(string), c.directory+"/got").CombinedOutput(); err != nil {
				t.Errorf("%s: %s: %v\n%s", path, urn, err, text)
			}
			os.Remove(c.directory + "/got")
			return true
		})
	}
	if len(said) != len(c.items) {
		t.Errorf("%d of %d items have been published", len(said), len(c.items))
	}
}

// publishedURN returns the read capability in a narinfo, or "" if there is no complete narinfo. On
// a busy machine the first ones may be without, for the publisher does not wait for ever.
func publishedURN(t *testing.T, url, hash string) string {
	for range 6000 {
		response, err := http.Get(url)
		if err != nil {
			return ""
		}
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			return ""
		}
		n, err := narinfo.Parse(text)
		if err != nil || response.StatusCode != http.StatusOK || n.NarHash != hash || len(n.ERIS) > 1 {
			t.Errorf("%s: status %s, error %v\n%s", url, response.Status, err, text)
			return ""
		}
		if len(n.ERIS) == 1 {
			return n.ERIS[0].URN
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("%s never has a read capability", url)
	return ""
}
