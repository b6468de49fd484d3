// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// store starts a block store on a Unix socket, once, and returns its URL.
func (w *workshop) store() (string, error) {
	if w.storeURL != "" {
		return w.storeURL, nil
	}
	socket := filepath.Join(w.directory, "eris.sock")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	w.storeTCP = "coap+tcp://" + l.Addr().String()
	l.Close()
	server := exec.Command(w.binary, "serve", "--socket="+socket, "--listen="+w.storeTCP, "--directory="+filepath.Join(w.directory, "blocks"))
	if os.Geteuid() == 0 {
		server.Args = append(server.Args, "--user=root")
	}
	var log bytes.Buffer
	server.Stderr = &log
	if err := server.Start(); err != nil {
		return "", err
	}
	w.closers = append(w.closers, func() { server.Process.Signal(os.Interrupt); server.Wait() })
	for range 200 {
		if info, err := os.Stat(socket); err == nil && info.Mode().Type() == os.ModeSocket {
			w.storeURL = "coap+unix://" + socket
			return w.storeURL, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return "", fmt.Errorf("the block store does not listen: %s", log.String())
}

// encode puts the blocks of an item into the store, and publishes it with its URN and with an
// uncompressed nar.
func (w *workshop) encode(it *benchItem) error {
	store, err := w.store()
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd := exec.Command(w.binary, "encode", "--item", "--store="+store, it.tree)
	cmd.Stderr = &stderr
	urn, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("encode: %w: %s", err, stderr.String())
	}
	digest, size, err := w.digest(it)
	if err != nil {
		return err
	}
	return w.publishInfo(&narinfo.Narinfo{
		StorePath: it.path, NarDigest: digest, NarSize: uint64(size), ERIS: []narinfo.ERIS{{URN: strings.TrimSpace(string(urn))}},
	}, []narinfo.URL{{URL: "nar/none/" + it.name, Compression: "none"}})
}

// restoreBlocks restores an item from blocks; or from its nar, if there is no store.
func (w *workshop) restoreBlocks(it *benchItem, store string) (sample, error) {
	d, err := w.destination()
	if err != nil {
		return sample{}, err
	}
	policy := "--policy=http-only"
	if store != "" {
		policy = "--policy=eris-only"
	}
	return w.helper(helperRun{
		program: []string{w.binary}, mode: "substitute", arguments: []string{policy}, url: w.url, fresh: true, options: "deduplicate=yes",
		env:      []string{"NIX_STORE_DIR=/gnu/store", "ERIS_STORE_URL=" + store},
		requests: []string{"substitute " + it.path + " " + filepath.Join(d, it.name)},
	})
}

// blocksRows restores the large item from blocks.
func blocksRows(make func(*workshop) (*benchItem, error)) func(w *workshop) ([]contestant, error) {
	return func(w *workshop) ([]contestant, error) {
		it, err := make(w)
		if err != nil {
			return nil, err
		}
		if err := w.encode(it); err != nil {
			return nil, err
		}
		store, err := w.store()
		if err != nil {
			return nil, err
		}
		return []contestant{
			{"ours, from blocks", func() (sample, error) { return w.restoreBlocks(it, store) }},
			{"ours, from the uncompressed nar", func() (sample, error) { return w.restoreBlocks(it, "") }},
			{"floor: SHA-256 on one core", func() (sample, error) { return hashFloor(it.size), nil }},
			{"floor: BLAKE2b, ChaCha20 and a copy on both cores", func() (sample, error) { return blockFloor(it.size, 1, false), nil }},
			{"floor: the same, 8 blocks hashed side by side", func() (sample, error) { return blockFloor(it.size, 1, true), nil }},
			{"floor: all work of client and server, with the copies of the kernel, on both cores", func() (sample, error) { return w.workFloor(it.size) }},
		}, nil
	}
}

// smallBlocksRows restores an item of small files from blocks.
func smallBlocksRows(make func(*workshop) (*benchItem, error)) func(w *workshop) ([]contestant, error) {
	return func(w *workshop) ([]contestant, error) {
		rows, err := blocksRows(make)(w)
		if err != nil {
			return nil, err
		}
		it, err := make(w)
		if err != nil {
			return nil, err
		}
		count, err := smallBlocks(it.tree)
		if err != nil {
			return nil, err
		}
		refs, err := fillStore(w.storeURL, eris.BlockSize1KiB)
		if err != nil {
			return nil, err
		}
		parts := func() (sample, error) {
			s, err := w.restoreBlocks(it, "")
			if err != nil {
				return s, err
			}
			blocks, err := getBlocks(w.storeURL, refs, eris.BlockSize1KiB, count, 256, false)
			return sample{wall: s.wall + blocks.wall, note: fmt.Sprintf("%d blocks;", count)}, err
		}
		return append(rows, contestant{"the uncompressed nar, and then as many blocks of 1 KiB, verified", parts}), nil
	}
}

// smallBlocks is how many blocks of 1 KiB the files of a tree take.
func smallBlocks(tree string) (count int, err error) {
	err = filepath.WalkDir(tree, func(_ string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		size := int64(eris.BlockSize1KiB)
		n := int(info.Size()/size) + 1
		for count += n; n > 1; count += n {
			n = (n + eris.BlockSize1KiB.Arity() - 1) / eris.BlockSize1KiB.Arity()
		}
		return nil
	})
	return count, err
}

// workFloor is what it takes on both cores to read so many bytes from a file, to send them through
// a socket, to receive, hash and decipher them in blocks of 32 KiB, to hash them once more as an
// archive, and to write them to a file.
func (w *workshop) workFloor(n int64) (sample, error) {
	const many = 8
	const portion = many * int64(eris.BlockSize32KiB)
	var group errgroup.Group
	ready, start := make(chan struct{}, 2), make(chan struct{})
	for i := range 2 {
		group.Go(func() error {
			name := filepath.Join(w.directory, fmt.Sprintf("floor-%d", i))
			from, err := os.Create(name + "-from")
			if err != nil {
				return err
			}
			defer os.Remove(from.Name())
			defer from.Close()
			to, err := os.Create(name + "-to")
			if err != nil {
				return err
			}
			defer os.Remove(to.Name())
			defer to.Close()
			sockets, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(sockets[0])
			defer unix.Close(sockets[1])
			if err := unix.SetsockoptInt(sockets[0], unix.SOL_SOCKET, unix.SO_SNDBUF, int(4*portion)); err != nil {
				return err
			}
			memory := make([]byte, portion)
			portions := n / 2 / portion
			for range portions {
				if _, err := from.Write(memory); err != nil {
					return err
				}
			}
			var blocks [many][]byte
			var refs [many]eris.Reference
			for i := range blocks {
				blocks[i] = memory[i*int(eris.BlockSize32KiB):][:eris.BlockSize32KiB]
			}
			ready <- struct{}{}
			<-start
			h := sha256.New()
			for p := range portions {
				if _, err := from.ReadAt(memory, p*portion); err != nil {
					return err
				}
				for _, b := range blocks { // a socket need not hold more
					if _, err := unix.Write(sockets[0], b); err != nil {
						return err
					}
					for len(b) > 0 {
						n, err := unix.Read(sockets[1], b)
						if err != nil {
							return err
						}
						b = b[n:]
					}
				}
				eris.SumAll(refs[:], blocks[:])
				for _, b := range blocks {
					eris.Decrypt(b, b, eris.Key{}, 0)
				}
				h.Write(memory)
				if _, err := to.Write(memory); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for range 2 {
		select {
		case <-ready:
		case <-time.After(time.Minute):
			close(start) // for the other one
			return sample{}, errors.Join(errors.New("no files"), group.Wait())
		}
	}
	begin := time.Now()
	close(start)
	err := group.Wait()
	return sample{wall: time.Since(begin)}, err
}

// encodeRows encodes the large item.
func encodeRows(w *workshop) ([]contestant, error) {
	it, err := largePlainItem(w)
	if err != nil {
		return nil, err
	}
	store, err := w.store()
	if err != nil {
		return nil, err
	}
	encode := func(to string) func() (sample, error) {
		return func() (sample, error) { return run(exec.Command(w.binary, "encode", "--store="+to, it.tree)) }
	}
	return []contestant{
		{"ours, blocks kept nowhere", encode("none")},
		{"ours, blocks in the store already", encode(store)},
		{"floor: 2 BLAKE2b and ChaCha20 on both cores", func() (sample, error) { return blockFloor(it.size, 2, false), nil }},
		{"floor: the same, and SHA-256 of the nar", func() (sample, error) {
			s, h := blockFloor(it.size, 2, false), hashFloor(it.size)
			s.wall += h.wall / 2
			return s, nil
		}},
		{"floor: the same, 8 blocks hashed side by side", func() (sample, error) {
			s, h := blockFloor(it.size, 2, true), hashFloor(it.size)
			s.wall += h.wall / 2
			return s, nil
		}},
	}, nil
}

// hashFloor is what SHA-256 of so many bytes takes on one core.
func hashFloor(n int64) sample {
	block := make([]byte, 128<<10)
	begin := time.Now()
	h := sha256.New()
	for ; n > 0; n -= int64(len(block)) {
		h.Write(block)
	}
	return sample{wall: time.Since(begin)}
}

// blockFloor is what hashing, deciphering and copying so many bytes takes on two cores, in blocks
// of 32 KiB that are hashed one by one or together.
func blockFloor(n int64, hashes int, together bool) sample {
	const many = 8
	groups := int(n / int64(many*eris.BlockSize32KiB))
	begin := time.Now()
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			var blocks, plaintexts [many][]byte
			var refs [many]eris.Reference
			for i := range many {
				blocks[i], plaintexts[i] = make([]byte, eris.BlockSize32KiB), make([]byte, eris.BlockSize32KiB)
			}
			for range groups / 2 {
				for range hashes {
					if together {
						eris.SumAll(refs[:], blocks[:])
						continue
					}
					for i := range many {
						refs[i] = eris.Sum(blocks[i])
					}
				}
				for i := range many {
					copy(plaintexts[i], blocks[i])
					eris.Decrypt(plaintexts[i], blocks[i], eris.Key{}, 0)
				}
			}
		})
	}
	group.Wait()
	return sample{wall: time.Since(begin)}
}

// getRows gets blocks from the store, many at a time.
func getRows(size eris.BlockSize) func(w *workshop) ([]contestant, error) {
	return func(w *workshop) ([]contestant, error) {
		url, err := w.store()
		if err != nil {
			return nil, err
		}
		refs, err := fillStore(url, size)
		if err != nil {
			return nil, err
		}
		count := 1 << 18
		if size == eris.BlockSize32KiB {
			count = 1 << 15
		}
		get := func(window int, unverified bool) contestant {
			name := fmt.Sprintf("ours, window %d", window)
			if unverified {
				name += ", not verified"
			}
			return contestant{name, func() (sample, error) { return getBlocks(url, refs, size, count, window, unverified) }}
		}
		return []contestant{
			get(256, true), get(256, false), get(16, true), get(1, true),
			{"floor: BLAKE2b on both cores", func() (sample, error) {
				s := verifyFloor(size, count)
				s.note = rate(size, count, s.wall)
				return s, nil
			}},
			{"coap-client, one block in each run", func() (sample, error) { return w.coapClient(refs[0], size) }},
		}, nil
	}
}

// fillStore puts 4096 blocks of a size.
func fillStore(url string, size eris.BlockSize) ([]eris.Reference, error) {
	store, err := coap.Open(url, coap.Options{})
	if err != nil {
		return nil, err
	}
	defer store.Close()
	refs := make([]eris.Reference, 4096)
	errs := make([]error, len(refs))
	var group sync.WaitGroup
	for i := range refs {
		block := make([]byte, size)
		rand.Read(block)
		refs[i] = eris.Sum(block)
		group.Go(func() { errs[i] = store.Put(context.Background(), refs[i], block) })
	}
	group.Wait()
	return refs, errors.Join(errs...)
}

// getBlocks gets so many blocks with so many requests in flight, in the way in which readers of
// contents do.
func getBlocks(url string, refs []eris.Reference, size eris.BlockSize, count, window int, unverified bool) (sample, error) {
	store, err := coap.Open(url, coap.Options{})
	if err != nil {
		return sample{}, err
	}
	defer store.Close()
	if window == 1 {
		count /= 16
	}
	if _, err := fetch.Get(context.Background(), store, refs[0], size, nil); err != nil {
		return sample{}, err // the connection is made
	}
	g := &getter{store: store, refs: refs, count: count, unverified: unverified, answered: make(chan *fetch.Request, window), over: make(chan struct{})}
	g.end = sync.OnceFunc(func() { close(g.over) })
	begin := time.Now()
	var group errgroup.Group
	for range window {
		g.start(&fetch.Request{Size: size, Dst: make([]byte, 0, size), Done: func(r *fetch.Request) { g.answered <- r }})
	}
	for range min(2, window) {
		group.Go(g.finish)
	}
	err = group.Wait()
	s := sample{wall: time.Since(begin)}
	s.note = rate(size, count, s.wall)
	return s, err
}

// getter gets blocks without a goroutine for each.
type getter struct {
	store      *coap.Store
	refs       []eris.Reference
	count      int
	unverified bool
	next, done atomic.Int64
	answered   chan *fetch.Request // has room for all, so that Done never waits
	end        func()              // closes over
	over       chan struct{}
}

// start requests the next block, if there is one.
func (g *getter) start(r *fetch.Request) {
	if i := int(g.next.Add(1)) - 1; i < g.count {
		r.Pair.Reference = g.refs[i%len(g.refs)]
		g.store.Start(r)
	}
}

// finish takes responses, some at a time.
func (g *getter) finish() error {
	defer g.end()
	const most = 16
	for {
		var batch []*fetch.Request
		select {
		case r := <-g.answered:
			batch = append(make([]*fetch.Request, 0, most), r)
		case <-g.over:
			return nil
		}
	more:
		for len(batch) < most {
			select {
			case r := <-g.answered:
				batch = append(batch, r)
			default:
				break more
			}
		}
		if !g.unverified {
			fetch.Verify(batch)
		}
		for _, r := range batch {
			if r.Err != nil {
				return r.Err
			}
			g.start(r)
		}
		if g.done.Add(int64(len(batch))) == int64(g.count) {
			return nil
		}
	}
}

// rate tells a speed.
func rate(size eris.BlockSize, count int, wall time.Duration) string {
	perSecond := float64(count) / wall.Seconds()
	return fmt.Sprintf("%.0f blocks/s, %.0f MB/s;", perSecond, perSecond*float64(size)/1e6)
}

func verifyFloor(size eris.BlockSize, count int) sample {
	begin := time.Now()
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			block := make([]byte, size)
			for range count / 2 {
				eris.Sum(block)
			}
		})
	}
	group.Wait()
	return sample{wall: time.Since(begin)}
}

// coapClient gets a block with the program of libcoap, by TCP.
func (w *workshop) coapClient(ref eris.Reference, size eris.BlockSize) (sample, error) {
	path, err := look("coap-client-notls")
	if err != nil {
		return sample{}, err
	}
	out := filepath.Join(w.directory, "block")
	s, err := run(exec.Command(path, "-m", "get", "-o", out, w.storeTCP+"/.well-known/eris/blocks?"+ref.String()))
	if err != nil {
		return s, err
	}
	if block, err := os.ReadFile(out); err != nil || len(block) != int(size) {
		return s, fmt.Errorf("coap-client wrote %d bytes: %w", len(block), err)
	}
	s.note = rate(size, 1, s.wall)
	return s, nil
}
