// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

var (
	_ eris.Blocks = (*Store)(nil)
	_ eris.Sink   = (*Store)(nil)
	_ eris.Sink   = (*Pipeline)(nil)
)

// testBlock returns the i-th block of a size, which is noise. It is the same on each call.
func testBlock(i int, size eris.BlockSize) (eris.Reference, []byte) {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], uint64(i))
	b := make([]byte, size)
	rand.NewChaCha8(seed).Read(b)
	return eris.Sum(b), b
}

// testOpen opens a store and closes it at the end of the test, after it has been checked.
func testOpen(t testing.TB, directory string, options Options) *Store {
	t.Helper()
	s, err := Open(directory, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func mustPut(t testing.TB, s *Store, i int, size eris.BlockSize) eris.Reference {
	t.Helper()
	ref, block := testBlock(i, size)
	if err := s.Put(t.Context(), ref, block); err != nil {
		t.Fatal(err)
	}
	return ref
}

func mustHave(t testing.TB, s *Store, i int, size eris.BlockSize) {
	t.Helper()
	ref, block := testBlock(i, size)
	got, err := s.Get(t.Context(), ref, size, make([]byte, 0, size))
	if err != nil {
		t.Fatalf("block %d: %v", i, err)
	}
	if !bytes.Equal(got, block) {
		t.Fatalf("block %d has other bytes", i)
	}
}

func mustLack(t testing.TB, s *Store, i int, size eris.BlockSize) {
	t.Helper()
	ref, _ := testBlock(i, size)
	if _, err := s.Get(t.Context(), ref, size, nil); !errors.Is(err, eris.ErrNotFound) {
		t.Fatalf("block %d: %v instead of ErrNotFound", i, err)
	}
}

// checkStore closes a store and checks that what is on disk is consistent: each record has a slot of its own which holds its
// block, no other slot is taken, and the sums are right. It returns the references.
func checkStore(t testing.TB, s *Store) map[eris.Reference]bool {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(filepath.Join(s.directory, indexName), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	refs := make(map[eris.Reference]bool)
	err = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("index: %v", err)
		}
		recorded, taken, err := loadIndex(tx)
		if err != nil {
			return err
		}
		counted := state{pin: recorded.pin}
		var files [classes]*os.File
		for c := range classes {
			name, _ := slabNames(c)
			if files[c], err = os.Open(filepath.Join(s.directory, name)); err != nil {
				return err
			}
			defer files[c].Close()
		}
		err = tx.Bucket(blocksBucket).ForEach(func(k, v []byte) error {
			ref := eris.Reference(k)
			refs[ref] = true
			r, err := parseRecord(v)
			if err != nil {
				return err
			}
			c, slot := r.location.class(), r.location.slot()
			counted.blocks[c]++
			if r.pin == recorded.pin {
				counted.pinned[c]++
			}
			word, bit := &taken[c][slot/slotsPerChunk][slot%slotsPerChunk/64], uint64(1)<<(slot%64)
			if *word&bit == 0 {
				t.Errorf("block %v is in slot %d, which is free or has another block", ref, slot)
			}
			*word &^= bit
			block := make([]byte, c.size())
			if _, err := files[c].ReadAt(block, int64(slot)*int64(c.size())); err != nil {
				return err
			}
			return eris.Verify(ref, block)
		})
		if err != nil {
			return err
		}
		if counted != recorded {
			t.Errorf("counted %+v, recorded %+v", counted, recorded)
		}
		for c := range classes {
			for _, b := range taken[c] {
				if *b != (bitmap{}) {
					t.Errorf("slots of class %d are taken without a block", c)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return refs
}

func TestPutGet(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "made", "by", "Open")
	s := testOpen(t, directory, Options{})
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		mustLack(t, s, 1, size)
		ref := mustPut(t, s, 1, size)
		mustHave(t, s, 1, size)
		// Whichever size; no memory given.
		_, block := testBlock(1, size)
		if got, err := s.Get(t.Context(), ref, 0, nil); err != nil || !bytes.Equal(got, block) {
			t.Errorf("size 0: %d bytes, %v", len(got), err)
		}
		// The memory given is used.
		dst := make([]byte, 0, size)
		if got, err := s.Get(t.Context(), ref, size, dst); err != nil || &got[0] != &dst[:1][0] {
			t.Errorf("memory given: not used, %v", err)
		}
		other := eris.BlockSize1KiB + eris.BlockSize32KiB - size
		if _, err := s.Get(t.Context(), ref, other, nil); !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("block of %v, asked for as one of %v: %v", size, other, err)
		}
		if _, err := s.Get(t.Context(), ref, 2048, nil); err == nil || errors.Is(err, eris.ErrNotFound) {
			t.Errorf("size 2048: %v", err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = testOpen(t, directory, Options{})
	mustHave(t, s, 1, eris.BlockSize1KiB)
	mustHave(t, s, 1, eris.BlockSize32KiB)
	mustLack(t, s, 2, eris.BlockSize1KiB)
	if got := len(checkStore(t, s)); got != 2 {
		t.Errorf("%d blocks", got)
	}
}

func TestPutRefuses(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	ref, block := testBlock(1, eris.BlockSize1KiB)
	wrong := bytes.Clone(block)
	wrong[1000] ^= 1
	var blockError *eris.BlockError
	long := make([]byte, 1025)
	puts := map[string]func() error{
		"other bytes":         func() error { return s.Put(t.Context(), ref, wrong) },
		"other bytes, pinned": func() error { return s.PutPinned(t.Context(), ref, wrong) },
		"no block size":       func() error { return s.Put(t.Context(), eris.Sum(long), long) },
		"no block size, add":  func() error { _, err := s.Add(t.Context(), long); return err },
		"empty":               func() error { _, err := s.Add(t.Context(), nil); return err },
		"batch": func() error {
			return s.PutBatch(t.Context(), []eris.Reference{ref, ref}, [][]byte{block, wrong})
		},
		"pipeline": func() error { return s.Pipeline(false).Put(t.Context(), ref, wrong) },
	}
	for name, put := range puts {
		if err := put(); !errors.As(err, &blockError) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.PutBatch(t.Context(), []eris.Reference{ref}, nil); err == nil {
		t.Error("batch of a reference without block was taken")
	}
	if stats := s.Stats(); stats.Puts != 0 || stats.Blocks1KiB != 0 {
		t.Errorf("something was put: %+v", stats)
	}
}

func TestAdd(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	want, block := testBlock(1, eris.BlockSize1KiB)
	if ref, err := s.Add(t.Context(), block); err != nil || ref != want {
		t.Errorf("%v, %v", ref, err)
	}
	mustHave(t, s, 1, eris.BlockSize1KiB)
}

func TestDuplicates(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	mustPut(t, s, 1, eris.BlockSize1KiB)
	commits := s.Stats().Commits
	mustPut(t, s, 1, eris.BlockSize1KiB)
	stats := s.Stats()
	if stats.Commits != commits || stats.Duplicates != 1 || stats.Puts != 2 || stats.Blocks1KiB != 1 {
		t.Errorf("after a duplicate: %+v", stats)
	}
	// In one batch.
	ref, block := testBlock(2, eris.BlockSize1KiB)
	if err := s.PutBatch(t.Context(), []eris.Reference{ref, ref, ref}, [][]byte{block, block, block}); err != nil {
		t.Fatal(err)
	}
	mustHave(t, s, 2, eris.BlockSize1KiB)
	if got := len(checkStore(t, s)); got != 2 {
		t.Errorf("%d blocks", got)
	}
}

func TestBatch(t *testing.T) {
	// The queue is shorter than the batch.
	s := testOpen(t, t.TempDir(), Options{QueueBytes: 1 << 18})
	var refs []eris.Reference
	var blocks [][]byte
	for i := range 600 {
		ref, block := testBlock(i, []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB}[i/300])
		refs, blocks = append(refs, ref), append(blocks, block)
	}
	if err := s.PutBatch(t.Context(), refs, blocks); err != nil {
		t.Fatal(err)
	}
	if err := s.PutBatch(t.Context(), nil, nil); err != nil {
		t.Fatal(err)
	}
	for i, ref := range refs {
		if got, err := s.Get(t.Context(), ref, 0, nil); err != nil || !bytes.Equal(got, blocks[i]) {
			t.Fatalf("block %d: %v", i, err)
		}
	}
	if got := len(checkStore(t, s)); got != 600 {
		t.Errorf("%d blocks", got)
	}
}

func TestPipeline(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{QueueBytes: 1 << 20})
	content := make([]byte, 3<<20+12345)
	rand.NewChaCha8([32]byte{7}).Read(content)
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		p := s.Pipeline(size == eris.BlockSize1KiB)
		capability, err := eris.Encode(t.Context(), bytes.NewReader(content), p, eris.EncodeOptions{BlockSize: size})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil {
			t.Fatal(err)
		}
		c, err := eris.Open(t.Context(), s, capability, int64(len(content)), eris.Window{})
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if _, err := c.WriteTo(t.Context(), &got); err != nil || !bytes.Equal(got.Bytes(), content) {
			t.Errorf("%v: read %d bytes, %v", size, got.Len(), err)
		}
	}
	if stats := s.Stats(); stats.PinnedBlocks != stats.Blocks1KiB {
		t.Errorf("%+v", stats)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	p := s.Pipeline(false)
	ref, block := testBlock(1, eris.BlockSize1KiB)
	if err := p.Put(t.Context(), ref, block); !errors.Is(err, ErrClosed) {
		t.Errorf("put to a closed store: %v", err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("waiting for nothing: %v", err)
	}
}

func TestLocked(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	if _, err := Open(directory, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := Rebuild(t.Context(), directory); !errors.Is(err, ErrLocked) {
		t.Errorf("rebuilt while open: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	testOpen(t, directory, Options{})
}

func TestClosed(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	ref := mustPut(t, s, 1, eris.BlockSize1KiB)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Get(t.Context(), ref, eris.BlockSize1KiB, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Get: %v", err)
	}
	ref, block := testBlock(2, eris.BlockSize1KiB)
	if err := s.Put(t.Context(), ref, block); !errors.Is(err, ErrClosed) {
		t.Errorf("Put: %v", err)
	}
	if err := s.PutBatch(t.Context(), []eris.Reference{ref}, [][]byte{block}); !errors.Is(err, ErrClosed) {
		t.Errorf("PutBatch: %v", err)
	}
	if err := s.UnpinAll(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("UnpinAll: %v", err)
	}
}

func TestContextEnded(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	cause := errors.New("no longer wanted")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	refs, blocks := make([]eris.Reference, 10), make([][]byte, 10)
	for i := range refs {
		refs[i], blocks[i] = testBlock(i, eris.BlockSize1KiB)
	}
	// Either the writer was faster or the cause is returned.
	for i := range refs {
		if err := s.Put(ctx, refs[i], blocks[i]); err != nil && !errors.Is(err, cause) {
			t.Errorf("Put: %v", err)
		} else if err == nil {
			mustHave(t, s, i, eris.BlockSize1KiB)
		}
	}
	if err := s.PutBatch(ctx, refs, blocks); err != nil && !errors.Is(err, cause) {
		t.Errorf("PutBatch: %v", err)
	}
	if err := s.UnpinAll(ctx); err != nil && !errors.Is(err, cause) {
		t.Errorf("UnpinAll: %v", err)
	}
	if _, err := s.Get(ctx, eris.Reference{}, 0, nil); !errors.Is(err, cause) {
		t.Errorf("Get: %v", err)
	}
	// What was given up holds no room in the queue.
	mustPut(t, s, 20, eris.BlockSize1KiB)
	if !s.room.TryAcquire(s.options.QueueBytes) {
		t.Error("room of the queue was lost")
	}
	s.room.Release(s.options.QueueBytes)
	checkStore(t, s)
}

func TestOptions(t *testing.T) {
	for _, limit := range []int64{-1, 1, MinBytes - 1} {
		if s, err := Open(t.TempDir(), Options{MaxBytes: limit}); err == nil {
			s.Close()
			t.Errorf("limit of %d bytes was taken", limit)
		}
	}
}

func TestStats(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{MaxBytes: 1 << 30})
	mustPut(t, s, 1, eris.BlockSize1KiB)
	mustPut(t, s, 2, eris.BlockSize1KiB)
	ref, block := testBlock(3, eris.BlockSize32KiB)
	if err := s.PutPinned(t.Context(), ref, block); err != nil {
		t.Fatal(err)
	}
	mustHave(t, s, 1, eris.BlockSize1KiB)
	mustHave(t, s, 3, eris.BlockSize32KiB)
	mustLack(t, s, 4, eris.BlockSize1KiB)
	want := Stats{
		Blocks1KiB: 2, Bytes1KiB: 2 << 10, Blocks32KiB: 1, Bytes32KiB: 1 << 15, PinnedBlocks: 1, PinnedBytes: 1 << 15,
		MaxBytes: 1 << 30, Hits: 2, Misses: 1, Puts: 3, Commits: 3,
	}
	if got := s.Stats(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestRebuild(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	for i := range 30 {
		mustPut(t, s, i, eris.BlockSize1KiB)
		mustPut(t, s, i, eris.BlockSize32KiB)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	index := filepath.Join(directory, indexName)
	for name, damage := range map[string]func() error{
		"missing": func() error { return os.Remove(index) },
		"empty":   func() error { return os.Truncate(index, 0) },
		"noise": func() error {
			_, b := testBlock(99, eris.BlockSize32KiB)
			return os.WriteFile(index, b, 0o600)
		},
		"cut": func() error { return os.Truncate(index, 8192) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(directory, Options{}); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v instead of ErrDamaged", name, err)
		}
		if n, err := Rebuild(t.Context(), directory); err != nil || n != 60 {
			t.Fatalf("%s: %d blocks, %v", name, n, err)
		}
		s := testOpen(t, directory, Options{})
		for i := range 30 {
			mustHave(t, s, i, eris.BlockSize1KiB)
			mustHave(t, s, i, eris.BlockSize32KiB)
		}
		if got := len(checkStore(t, s)); got != 60 {
			t.Errorf("%s: %d blocks", name, got)
		}
	}
}

// TestReadsAreBounded takes all places for reads of a part: a further one waits for a place, or for its context.
func TestReadsAreBounded(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	ref := mustPut(t, s, 0, eris.BlockSize1KiB)
	places := s.reads[ref[0]%readShares].places
	for range readsPerShare {
		places <- struct{}{}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	tired := errors.New("tired")
	cancel(tired)
	if _, err := s.Get(ctx, ref, 0, nil); !errors.Is(err, tired) {
		t.Errorf("Get returns %v", err)
	}
	done := make(chan error)
	go func() {
		_, err := s.Get(t.Context(), ref, 0, nil)
		done <- err
	}()
	<-places
	if err := <-done; err != nil {
		t.Error(err)
	}
	for range readsPerShare - 1 {
		<-places
	}
	mustHave(t, s, 0, eris.BlockSize1KiB)
}
