// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/reuse"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// silent is a source that answers nothing any more once so many bytes were requested.
type silent struct {
	fetch.Source
	after int64

	mu   sync.Mutex
	held []*fetch.Request
}

func (s *silent) Start(r *fetch.Request) {
	s.mu.Lock()
	s.after -= int64(r.Size)
	hold := s.after < 0
	if hold {
		s.held = append(s.held, r)
	}
	s.mu.Unlock()
	if !hold {
		s.Source.Start(r)
	}
}

func (s *silent) Cancel(r *fetch.Request) {
	s.mu.Lock()
	i := slices.Index(s.held, r)
	if i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
	}
	s.mu.Unlock()
	if i < 0 {
		s.Source.Cancel(r)
		return
	}
	r.Err = context.Canceled
	r.Done(r)
}

// TestLeaves gets an item that differs from an older one in more than hashes.
func TestLeaves(t *testing.T) {
	random := make([]byte, 4<<20)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	some, other := string(random), string(random[:2<<20])+"!"+string(random[1+2<<20:])
	slow := func() substitute.Speed {
		return substitute.Speed{Rate: 2e6, Latency: time.Millisecond, Known: true}
	}
	for _, test := range []struct {
		name   string
		policy substitute.Policy
		off    bool
		nar    bool                    // the blocks are a nar
		more   string                  // contents of the new item
		length uint64                  // of the old one, differs by that
		speed  func() substitute.Speed // of the stores
		ahead  bool
		most   int64 // bytes of blocks that may be fetched
		listed bool  // among the ways
		given  bool  // up for the nar
	}{
		{name: "by leaves", more: other, most: 100 << 10, listed: true},
		{name: "ahead of the daemon", more: other, most: 100 << 10, listed: true, ahead: true},
		{name: "blocks alone", more: other, policy: substitute.ERISOnly, most: 100 << 10, listed: true},
		{name: "an old item of another length", more: some + "!", length: 8, most: 100 << 10, listed: true},
		{name: "rewritten", more: some},
		{name: "nars first", more: other, policy: substitute.HTTPFirst, listed: true},
		{name: "nars alone", more: other, policy: substitute.HTTPOnly},
		{name: "turned off", more: other, policy: substitute.ERISOnly, off: true, most: 5 << 20},
		{name: "a nar in blocks", more: other, policy: substitute.ERISOnly, nar: true, most: 5 << 20, listed: true},
		{name: "others all over", more: "-" + some, policy: substitute.ERISOnly, most: 5 << 20, listed: true},
		{name: "others all over, slowly", more: "-" + some, speed: slow, most: 3 << 20, listed: true, given: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := t.TempDir()
			old, _ := makeItem(t, store, itemName(1, "x"), itemName(2, "y"), some)
			want, archive := makeItem(t, store, itemName(3, "x"), itemName(4, "y"), test.more)
			old.NarSize = want.NarSize + test.length
			backend := sourcetest.NewBackend()
			encoded, err := erisfs.Encode(t.Context(), nar.NewTree(want.StorePath), backend.Put, erisfs.EncodeOptions{})
			if test.nar {
				encoded.Capability, err = eris.Encode(t.Context(), bytes.NewReader(archive), backend.Put, eris.EncodeOptions{})
			}
			want.ERIS = []narinfo.ERIS{{URN: encoded.Capability.URN()}}
			must(t, errors.Join(err, restore.Remove(want.StorePath)))
			key, server := acl.GenerateSigningKey(), newTestServer(t)
			server.has(want.StorePath, signInfo(t, key, want))
			server.texts["/nar"] = string(archive)
			blocks := &silent{Source: pool.New([]pool.Member{{Source: backend.Open(16)}}, pool.Options{})}
			defer blocks.Close()
			var fetched atomic.Int64
			var finder *reuse.Finder
			if !test.off {
				finder = finderOf(t, store, old)
			}
			for attempt := range 2 {
				place := want.StorePath
				blocks.after = test.most
				s, log := withLog(t, key, server.url)
				s.StoreDir, s.Policy, s.Reuse, s.UnsignedCapabilities, s.Verbose, s.StoreSpeed = store, test.policy, finder, true, true, test.speed
				s.Blocks = fetch.Counted(blocks, func(n int) { fetched.Add(int64(n)) })
				var outcome substitute.Outcome
				if test.ahead {
					place = store + "/staged"
					r := s.Prepare(want.StorePath, place)
					outcome = r.Run(t.Context())
					r.Show()
				} else {
					outcome = s.Substitute(t.Context(), want.StorePath, place)
				}
				if outcome.Status != substitute.Success {
					t.Fatalf("status %d:\n%s", outcome.Status, log)
				}
				if text, err := os.ReadFile(place); err != nil || !strings.HasSuffix(string(text), itemName(4, "y")+test.more) {
					t.Error("other contents")
				}
				must(t, restore.Remove(place))
				// The second time it is known what is of no use.
				listed := strings.Contains(log.String(), " with "+old.StorePath)
				if listed != (test.listed && !(test.given && attempt == 1)) && test.more != some {
					t.Errorf("attempt %d: leaves are among the ways: %t", attempt, listed)
				}
				if rewriting := strings.Contains(log.String(), "file://"); rewriting != (!test.off && test.length == 0 && (attempt == 0 || test.more == some)) {
					t.Errorf("attempt %d: rewriting is tried: %t", attempt, rewriting)
				}
				if n := fetched.Swap(0); n > test.most || (n == 0) != (test.most == 0) && attempt == 0 {
					t.Errorf("attempt %d: %d bytes of blocks", attempt, n)
				}
				log.warned(t)
			}
			if text, err := os.ReadFile(old.StorePath); err != nil || string(text) != "uses "+store+"/"+itemName(2, "y")+some {
				t.Error("the old item has changed")
			}
		})
	}
}
