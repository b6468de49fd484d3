// SPDX-License-Identifier: GPL-3.0-or-later

package substitute_test

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// memoryBlocks has blocks, and hands them out at a bounded pace.
type memoryBlocks struct {
	*fetch.Workers
	*sourcetest.Backend
	pace      time.Duration // per block, one after the other
	requested atomic.Int64
}

func newMemoryBlocks(t testing.TB, backend *sourcetest.Backend, pace time.Duration) *memoryBlocks {
	m := &memoryBlocks{Backend: backend, pace: pace}
	m.Workers = fetch.NewWorkers("memory:", 1, m.Get)
	t.Cleanup(func() { m.Close() })
	return m
}

func (m *memoryBlocks) Get(ctx context.Context, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	m.requested.Add(1)
	if m.pace > 0 {
		select {
		case <-time.After(m.pace):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return m.Backend.Get(ctx, ref, size, dst)
}

// know has a substituter know how fast a server is.
func know(s *substitute.Substituter, server string, speed substitute.Speed) {
	s.State.Measured(server, int64(1000*speed.Rate), 1000*time.Second, speed.Latency)
}

func TestChoice(t *testing.T) {
	tree := filepath.Join(t.TempDir(), "tree")
	must(t, os.Mkdir(tree, 0o755))
	random := rand.NewChaCha8([32]byte{1})
	for i, size := range []int{4 << 20, 100_000, 1000, 10, 0} {
		contents := make([]byte, size)
		random.Read(contents)
		must(t, os.WriteFile(filepath.Join(tree, string(rune('a'+i))), contents, 0o644))
	}
	all := sourcetest.NewBackend()
	encoded, err := erisfs.Encode(t.Context(), nar.NewTree(tree), all.Put, erisfs.EncodeOptions{})
	must(t, err)
	var archive bytes.Buffer
	if _, err := nar.Write(&archive, nar.NewTree(tree)); err != nil {
		t.Fatal(err)
	}
	key := acl.GenerateSigningKey()
	path := itemPath(1)
	text := signERIS(t, key, path, encoded)

	slow := substitute.Speed{Rate: 1e6, Latency: 50 * time.Millisecond, Known: true}
	fast := substitute.Speed{Rate: 100e6, Latency: time.Millisecond, Known: true}
	unknown := substitute.Speed{}
	for _, v := range []struct {
		name          string
		store, server substitute.Speed
		policy        substitute.Policy
		near          bool
		pace          time.Duration
		lacks         bool // the server lacks the nar
		blocks, nar   bool // what is asked for
		shown         string
	}{
		{name: "nothing is known", store: unknown, server: unknown, blocks: true, shown: "way 1 of 2: urn:eris"},
		{name: "far store", store: slow, server: fast, nar: true, shown: "way 1 of 2: http"},
		{name: "far server", store: fast, server: slow, blocks: true},
		{name: "alike", store: fast, server: fast, blocks: true},
		{name: "far store, but the blocks are here", store: slow, server: fast, near: true, blocks: true, shown: "(0 B of"},
		{name: "far store alone has the item", store: slow, server: fast, lacks: true, nar: true, blocks: true},
		{name: "blocks are to be tried first", store: slow, server: fast, policy: substitute.ERISFirst, blocks: true},
		{name: "blocks alone are to be tried", store: slow, server: fast, policy: substitute.ERISOnly, blocks: true},
		{name: "nars are to be tried first", store: fast, server: slow, policy: substitute.HTTPFirst, nar: true},
		{
			name: "the store turns out to be slow", store: unknown, server: fast, pace: 100 * time.Millisecond,
			blocks: true, nar: true, shown: "too slowly",
		},
		{
			name: "the store turns out to be slow, but alone has the item", store: unknown, server: fast, pace: 25 * time.Millisecond,
			lacks: true, blocks: true, nar: true, shown: "too slowly",
		},
	} {
		t.Run(v.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *testNetwork) {
				nars := 0
				server := n.serve(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case strings.HasSuffix(r.URL.Path, ".narinfo"):
						w.Write([]byte(text))
					default:
						nars++
						if v.lacks {
							http.NotFound(w, r)
							return
						}
						w.Write(archive.Bytes())
					}
				})
				blocks := newMemoryBlocks(t, all, v.pace)
				s, log := n.with(key, server)
				s.Blocks, s.Policy, s.Verbose = blocks, cmp.Or(v.policy, substitute.Fastest), true
				know(s, server, v.server)
				known := s.State.Get(server).Rate
				s.StoreSpeed = func() substitute.Speed { return v.store }
				if v.near {
					has := func(_ context.Context, ref eris.Reference, _ eris.BlockSize) bool { return all.Has(ref) }
					s.Nearby = &image.Nearby{Source: newMemoryBlocks(t, all, 0), Has: has, Stride: 1}
				}
				destination := filepath.Join(t.TempDir(), "item")
				defer restore.Remove(destination) // it is read-only
				e, err := s.Explain(t.Context(), path)
				if err != nil || len(e.Ways) == 0 || nars > 0 || blocks.requested.Load() > 0 || log.String() != "" {
					t.Fatalf("%+v, error %v; %d nars were requested; shown:\n%s", e, err, nars, log.String())
				}
				outcome := s.Substitute(t.Context(), path, destination)
				if outcome.Status != substitute.Success {
					t.Fatalf("%+v:\n%s", outcome, log.String())
				}
				if first := fmt.Sprintf("way 1 of %d: %s: ", len(e.Ways), e.Ways[0].Name); !strings.Contains(log.String(), first) {
					t.Errorf("it is not done what was explained, %q:\n%s", first, log.String())
				}
				checkRestored(t, destination, outcome.NarHash)
				requested := blocks.requested.Load()
				if (requested > 0) != v.blocks || (nars > 0) != v.nar {
					t.Errorf("%d blocks and %d nars were requested:\n%s", requested, nars, log.String())
				}
				if !strings.Contains(log.String(), v.shown) {
					t.Errorf("shown:\n%s", log.String())
				}
				if requested == 0 && !strings.Contains(log.String(), "not from blocks") {
					t.Errorf("it is not said why blocks were not used:\n%s", log.String())
				}
				if rate := s.State.Get(server).Rate; (rate != known) != (v.nar && !v.lacks) {
					t.Errorf("the rate of the server is %v instead of %v", rate, known)
				}
			})
		})
	}
}

// signERIS makes a signed narinfo of an encoded tree, whose nar is not compressed.
func signERIS(t testing.TB, key *acl.SigningKey, path string, encoded erisfs.Result) string {
	t.Helper()
	return signInfo(t, key, &narinfo.Narinfo{
		StorePath: path, NarDigest: encoded.NarHash, NarSize: encoded.NarSize,
		ERIS: []narinfo.ERIS{{URN: encoded.Capability.URN()}},
	})
}
