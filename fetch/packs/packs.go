// SPDX-License-Identifier: GPL-3.0-or-later

// Package packs keeps all blocks of an item in one object, for stores that are slow or dear for
// each object: web servers far away, buckets, networks for delivery. [Open] is a store of such
// packs. The format is in docs/formats.md: a block dump that is named by the reference of the root,
// with the inner nodes before the leaves, and at its end a table of where the blocks are.
//
// # Reading
//
// The first request for a block of an item reads the table, at the end of the pack, and meanwhile
// its beginning. Other blocks are got with those behind them, by one range; where most of these are
// wanted, too, what is behind them is read ahead, up to 24 MiB or what comes in about a second. To
// know which pack a block is in, the store looks at [fetch.Request.Root]; without that, at the
// packs that it has read lately, and for one that is named like the block.
//
// # Writing
//
// Blocks that are put wait in a temporary file until [Store.Finish] says of which items they are.
//
// # What is not trusted
//
// Whoever asks for blocks verifies them. A pack may have 524,288 blocks, for which 20 bytes of
// memory each are taken; 8 packs are known at a time, of which 20 MiB of blocks wait in memory, and
// more only if somebody waits for them.
package packs

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
)

// objects is where packs are kept. It is safe for concurrent use.
type objects interface {
	// Range and PutObject are as those of [web.Store]; PutObject may take the file away.
	Range(ctx context.Context, name string, from, n int64, use func(body io.Reader, from, total int64) error) error
	PutObject(ctx context.Context, name string, content *os.File, size int64, sum [sha256.Size]byte) error
	// Renew is as that of [web.Store], too.
	Renew()
	// String returns the URL of the store without anything secret.
	String() string
	// Close ends all calls.
	Close() error
}

const (
	workers  = 256
	maxPacks = 8
	// suffix is how the names of packs end.
	suffix = ".cbor"
	// missingAge is for how long a pack that was not there is not looked for again, and maxMissing
	// how many are remembered.
	missingAge, maxMissing = 30 * time.Second, 4096
)

// Store is a store of packs. It implements [fetch.Store], and is safe for concurrent use.
type Store struct {
	*fetch.Workers
	url       storeurl.URL
	objects   objects
	directory string
	ctx       context.Context
	cancel    context.CancelFunc
	group     sync.WaitGroup

	mu       sync.Mutex
	packs    map[eris.Reference]*pack
	uses     int64
	left     sync.Cond // what waits until a pack is not in use any more waits on it
	missing  map[eris.Reference]time.Time
	gets     int64 // requests
	held     int   // bytes of blocks that wait for requests
	room     sync.Cond
	runs     []*run // of all packs, in the order in which they were used
	received int64  // bytes of runs, since there was none, and when the first of them came
	began    time.Time
	moved    atomic.Int64 // bytes that have been read

	putting sync.Mutex
	spool   *spool
}

var _ fetch.Store = (*Store)(nil)

// Open returns the store of packs at a URL: https://HOST/BASE?packed, where packs are at
// BASE/REFERENCE.cbor; file:DIRECTORY?packed, where they are files; or a bucket,
// s3://BUCKET/PREFIX?endpoint=URL. Requests to a bucket are signed if the variables
// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set; AWS_SESSION_TOKEN and AWS_REGION are heeded.
//
// Open makes no connection. What may be secret in the URL is not shown by errors. The Store must be
// closed.
func Open(url string, o web.Options) (*Store, error) {
	u, err := storeurl.ParseScheme(url, "http", "https", "file", "s3")
	if err != nil {
		return nil, err
	}
	var kept objects
	directory := ""
	switch u.Scheme {
	case "s3":
		kept, err = openBucket(u, o)
	case "file":
		kept, directory = directoryOf{u}, u.Path
	default:
		kept, err = web.Open(url, o)
	}
	if err != nil {
		return nil, err
	}
	s := &Store{
		url: u, objects: kept, directory: directory, packs: map[eris.Reference]*pack{}, missing: map[eris.Reference]time.Time{},
	}
	s.left.L, s.room.L = &s.mu, &s.mu
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.Workers = fetch.NewWorkers(kept.String(), workers, nil)
	s.Workers.Within = s.get
	return s, nil
}

// AnySize reports whether a block that is not there in one size is not there in the other either.
func (s *Store) AnySize() bool { return true }

// Progress returns how many bytes have been read, also of what is before the blocks asked for.
func (s *Store) Progress() int64 { return s.moved.Load() }

// Renew has further requests go over new connections; what is under way fails.
func (s *Store) Renew() { s.objects.Renew() }

// read is Range of the objects, counted.
func (s *Store) read(ctx context.Context, name string, from, n int64, use func(body io.Reader, from, total int64) error) error {
	return s.objects.Range(ctx, name, from, n, func(body io.Reader, from, total int64) error {
		count := writerFunc(func(b []byte) (int, error) {
			s.moved.Add(int64(len(b)))
			return len(b), nil
		})
		return use(io.TeeReader(body, count), from, total)
	})
}

// Close ends all requests.
func (s *Store) Close() error {
	s.cancel()
	s.mu.Lock()
	s.room.Broadcast()
	s.mu.Unlock()
	s.Workers.Close()
	s.group.Wait()
	s.objects.Close()
	s.putting.Lock()
	defer s.putting.Unlock()
	if s.spool != nil {
		s.spool.file.Close()
	}
	return nil
}

func (s *Store) get(ctx context.Context, root, ref eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
	if !s.url.Get {
		return nil, eris.ErrNotFound
	}
	p, err := s.use(ctx, root, ref)
	if err != nil {
		return nil, err
	}
	defer s.leave(p)
	select {
	case <-p.opened:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if p.err != nil {
		return nil, p.err
	}
	for {
		if block, err := p.get(ctx, ref, size); err != errTaken {
			return block, err
		}
	}
}

// use returns the pack where a block should be, which may not be open yet. It must be left.
func (s *Store) use(ctx context.Context, root, ref eris.Reference) (*pack, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ctx.Err() == nil {
		p := s.known(root, ref)
		if root == (eris.Reference{}) {
			root = ref
		}
		if p == nil && time.Since(s.missing[root]) < missingAge {
			return nil, eris.ErrNotFound
		}
		if p == nil && (len(s.packs) < maxPacks || s.drop()) {
			p = s.begin(root)
		}
		if p != nil {
			s.uses++
			p.used = s.uses
			p.users++
			return p, nil
		}
		stop := context.AfterFunc(ctx, s.wake)
		s.left.Wait()
		stop()
	}
	return nil, context.Cause(ctx)
}

// wake has what waits for a pack look again. Called without the lock.
func (s *Store) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left.Broadcast()
}

// known returns the pack with a root; or if that is not known, one in memory that has the block, or
// is named like it. The lock must be held here and below.
func (s *Store) known(root, ref eris.Reference) *pack {
	if root != (eris.Reference{}) {
		return s.packs[root]
	}
	if p := s.packs[ref]; p != nil {
		return p
	}
	for _, p := range s.packs {
		select {
		case <-p.opened:
			if p.err == nil {
				if _, ok := p.table.find(ref); ok {
					return p
				}
			}
		default:
		}
	}
	return nil
}

func (s *Store) begin(root eris.Reference) *pack {
	p := &pack{s: s, name: root.String() + suffix, opened: make(chan struct{})}
	p.ctx, p.end = context.WithCancel(s.ctx)
	s.packs[root] = p
	s.group.Go(func() {
		if p.open(); p.err != nil {
			s.failed(root, p.err)
		}
	})
	return p
}

// failed takes note that a pack cannot be read. Called without the lock.
func (s *Store) failed(root eris.Reference, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.packs, root)
	s.left.Broadcast()
	if !errors.Is(err, eris.ErrNotFound) {
		return
	}
	if len(s.missing) >= maxMissing {
		clear(s.missing)
	}
	s.missing[root] = time.Now()
}

// drop forgets the pack that has not been used for longest, if there is one that is not in use.
func (s *Store) drop() bool {
	var oldest eris.Reference
	for root, p := range s.packs {
		if o := s.packs[oldest]; p.users == 0 && (o == nil || p.used < o.used) {
			oldest = root
		}
	}
	p := s.packs[oldest]
	if p == nil {
		return false
	}
	p.end()
	delete(s.packs, oldest)
	s.runs = slices.DeleteFunc(s.runs, func(r *run) bool {
		if r.pack == p {
			s.forget(r)
		}
		return r.pack == p
	})
	s.room.Broadcast()
	return true
}

func (s *Store) leave(p *pack) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.users--; p.users == 0 {
		s.left.Broadcast()
	}
}
