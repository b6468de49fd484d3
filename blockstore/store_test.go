// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

var _ fetch.Store = (*Store)(nil)

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
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func mustPut(t testing.TB, s *Store, i int, size eris.BlockSize) eris.Reference {
	t.Helper()
	ref, block := testBlock(i, size)
	must(t, s.Put(t.Context(), ref, block))
	return ref
}

// mixedSize is the size of block i where both sizes occur.
func mixedSize(i int) eris.BlockSize {
	if i%8 == 0 {
		return eris.BlockSize32KiB
	}
	return eris.BlockSize1KiB
}

// testBlocks returns blocks of sizes that a function tells.
func testBlocks(from, to int, size func(int) eris.BlockSize) (refs []eris.Reference, blocks [][]byte) {
	for i := from; i < to; i++ {
		ref, block := testBlock(i, size(i))
		refs, blocks = append(refs, ref), append(blocks, block)
	}
	return refs, blocks
}

// putMany puts blocks, by the hundred, and returns their references.
func putMany(t testing.TB, s *Store, size eris.BlockSize, from, to int) (all []eris.Reference) {
	t.Helper()
	for ; from < to; from += 100 {
		refs, blocks := testBlocks(from, min(from+100, to), func(int) eris.BlockSize { return size })
		must(t, s.PutBatch(t.Context(), refs, blocks))
		all = append(all, refs...)
	}
	return all
}

func mustHave(t testing.TB, s *Store, i int, size eris.BlockSize) {
	t.Helper()
	ref, block := testBlock(i, size)
	got, err := fetch.Get(t.Context(), s, ref, size, make([]byte, 0, size))
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
	if _, err := fetch.Get(t.Context(), s, ref, size, nil); !errors.Is(err, eris.ErrNotFound) {
		t.Fatalf("block %d: %v instead of ErrNotFound", i, err)
	}
}

// checkStore closes a store and checks that what is on disk is consistent: the index is, and each
// slot holds its block. It returns the references.
func checkStore(t testing.TB, s *Store) map[eris.Reference]bool {
	t.Helper()
	must(t, s.Close())
	db, err := bbolt.Open(filepath.Join(s.directory, indexName), 0o600, &bbolt.Options{ReadOnly: true})
	must(t, err)
	defer db.Close()
	refs := make(map[eris.Reference]bool)
	err = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("index: %v", err)
		}
		if err := checkEntries(t.Context(), tx); err != nil {
			return err
		}
		var slabs [classes]*os.File
		for c := range classes {
			name, _ := slabNames(c)
			var err error
			if slabs[c], err = os.Open(filepath.Join(s.directory, name)); err != nil {
				return err
			}
			defer slabs[c].Close()
		}
		return tx.Bucket(blocksBucket).ForEach(func(k, v []byte) error {
			ref := eris.Reference(k)
			refs[ref] = true
			l, err := parseLocation(k, v)
			if err != nil {
				return err
			}
			block := make([]byte, l.class().size())
			if _, err := slabs[l.class()].ReadAt(block, int64(l.slot())*int64(len(block))); err != nil {
				return err
			}
			return eris.Verify(ref, block)
		})
	})
	must(t, err)
	return refs
}

func TestPutGet(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "made", "by", "Open")
	s := testOpen(t, directory, Options{})
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		mustLack(t, s, 1, size)
		ref := mustPut(t, s, 1, size)
		mustHave(t, s, 1, size)
		// The memory given is used.
		dst := make([]byte, 0, size)
		if got, err := fetch.Get(t.Context(), s, ref, size, dst); err != nil || &got[0] != &dst[:1][0] {
			t.Errorf("memory given: not used, %v", err)
		}
		other := eris.BlockSize1KiB + eris.BlockSize32KiB - size
		if _, err := fetch.Get(t.Context(), s, ref, other, nil); !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("block of %v, asked for as one of %v: %v", size, other, err)
		}
		if _, err := fetch.Get(t.Context(), s, ref, 2048, nil); err == nil || errors.Is(err, eris.ErrNotFound) {
			t.Errorf("size 2048: %v", err)
		}
		// Memory that does not suffice is not used.
		r := fetch.Request{Pair: eris.Pair{Reference: ref}, Size: size, Dst: make([]byte, 0, 10), Done: func(*fetch.Request) {}}
		s.Start(&r)
		if fetch.Verify([]*fetch.Request{&r}); r.Err != nil {
			t.Error(r.Err)
		}
	}
	must(t, s.Close())
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
	long := make([]byte, 1025)
	for name, err := range map[string]error{
		"other bytes":   s.Put(t.Context(), ref, wrong),
		"no block size": s.Put(t.Context(), eris.Sum(long), long),
		"empty":         s.Put(t.Context(), eris.Sum(nil), nil),
		"batch":         s.PutBatch(t.Context(), []eris.Reference{ref, ref}, [][]byte{block, wrong}),
	} {
		if !errors.As(err, new(*eris.BlockError)) {
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

func TestDuplicates(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	mustPut(t, s, 1, eris.BlockSize1KiB)
	mustPut(t, s, 1, eris.BlockSize1KiB)
	stats := s.Stats()
	if stats.Duplicates != 1 || stats.Puts != 2 || stats.Blocks1KiB != 1 {
		t.Errorf("after a duplicate: %+v", stats)
	}
	// In one batch.
	ref, block := testBlock(2, eris.BlockSize1KiB)
	must(t, s.PutBatch(t.Context(), []eris.Reference{ref, ref, ref}, [][]byte{block, block, block}))
	mustHave(t, s, 2, eris.BlockSize1KiB)
	if got := len(checkStore(t, s)); got != 2 {
		t.Errorf("%d blocks", got)
	}
}

func TestBatch(t *testing.T) {
	// The queue is shorter than the batch.
	s := testOpen(t, t.TempDir(), Options{queueBytes: 1 << 18})
	refs, blocks := testBlocks(0, 600, mixedSize)
	must(t, s.PutBatch(t.Context(), refs, blocks))
	must(t, s.PutBatch(t.Context(), nil, nil))
	for i, ref := range refs {
		if got, err := fetch.Get(t.Context(), s, ref, eris.BlockSize(len(blocks[i])), nil); err != nil || !bytes.Equal(got, blocks[i]) {
			t.Fatalf("block %d: %v", i, err)
		}
	}
	if got := len(checkStore(t, s)); got != 600 {
		t.Errorf("%d blocks", got)
	}
}

func TestLocked(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	if _, err := Open(directory, Options{}); !errors.Is(err, files.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := Rebuild(t.Context(), directory); !errors.Is(err, files.ErrLocked) {
		t.Errorf("rebuilt while open: %v", err)
	}
	must(t, s.Close())
	testOpen(t, directory, Options{})
}

func TestClosed(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	ref := mustPut(t, s, 1, eris.BlockSize1KiB)
	for range 2 {
		must(t, s.Close())
	}
	if _, err := fetch.Get(t.Context(), s, ref, eris.BlockSize1KiB, nil); !errors.Is(err, fetch.ErrClosed) {
		t.Errorf("Get: %v", err)
	}
	ref, block := testBlock(2, eris.BlockSize1KiB)
	if err := s.Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrClosed) {
		t.Errorf("Put: %v", err)
	}
	if err := s.PutBatch(t.Context(), []eris.Reference{ref}, [][]byte{block}); !errors.Is(err, fetch.ErrClosed) {
		t.Errorf("PutBatch: %v", err)
	}
}

func TestContextEnded(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	cause := errors.New("no longer wanted")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	refs, blocks := testBlocks(0, 10, mixedSize)
	// Either the writer was faster or the cause is returned.
	for i := range refs {
		if err := s.Put(ctx, refs[i], blocks[i]); err != nil && !errors.Is(err, cause) {
			t.Errorf("Put: %v", err)
		} else if err == nil {
			mustHave(t, s, i, mixedSize(i))
		}
	}
	if err := s.PutBatch(ctx, refs, blocks); err != nil && !errors.Is(err, cause) {
		t.Errorf("PutBatch: %v", err)
	}
	// What was given up holds no room in the queue.
	mustPut(t, s, 20, eris.BlockSize1KiB)
	if !s.room.TryAcquire(s.options.queueBytes) {
		t.Error("room of the queue was lost")
	}
	s.room.Release(s.options.queueBytes)
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
	mustPut(t, s, 3, eris.BlockSize32KiB)
	mustHave(t, s, 1, eris.BlockSize1KiB)
	mustHave(t, s, 3, eris.BlockSize32KiB)
	mustLack(t, s, 4, eris.BlockSize1KiB)
	want := Stats{
		Blocks1KiB: 2, Blocks32KiB: 1, Bytes: 34 << 10,
		MaxBytes: 1 << 30, Hits: 2, Misses: 1, Puts: 3,
	}
	if got := s.Stats(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestReadsAreBounded has as many reads as there may be: a further one waits.
func TestReadsAreBounded(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	mustPut(t, s, 0, eris.BlockSize1KiB)
	for range maxReads {
		s.reads <- struct{}{}
	}
	freed := make(chan struct{})
	go func() {
		close(freed)
		<-s.reads
	}()
	mustHave(t, s, 0, eris.BlockSize1KiB)
	select {
	case <-freed:
	default:
		t.Error("a read did not wait")
	}
	for range maxReads - 1 {
		<-s.reads
	}
	mustHave(t, s, 0, eris.BlockSize1KiB)
}

// A reference that agrees with that of a block in its first eight and last four bytes is not that
// of the block, whatever stands between: not even where a CRC over the reference is the same.
func TestForgedReference(t *testing.T) {
	s := testOpen(t, t.TempDir(), Options{})
	for _, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB} {
		ref := mustPut(t, s, 1, size)
		// The remainder of a multiple of the polynomial is 0.
		const multiple = 1 | uint64(crc32.Castagnoli)<<1
		for name, difference := range map[string]uint64{"one bit": 1, "same CRC": multiple} {
			forged := ref
			binary.LittleEndian.PutUint64(forged[12:], binary.LittleEndian.Uint64(ref[12:])^difference)
			mustHave(t, s, 1, size)
			if _, err := fetch.Get(t.Context(), s, forged, size, nil); err == nil {
				t.Errorf("%v, %s: the block was got", size, name)
			}
			mustHave(t, s, 1, size)
		}
		forged := ref
		binary.LittleEndian.PutUint64(forged[12:], binary.LittleEndian.Uint64(ref[12:])^multiple)
		if forged == ref || crc32.Checksum(forged[:], castagnoli) != crc32.Checksum(ref[:], castagnoli) {
			t.Error("the test is wrong")
		}
	}
}

// TestCloseWhileChecked closes a store whose index takes long to be checked, while more is being
// put than there is room for: all of that fails, and what was there is there afterwards.
func TestCloseWhileChecked(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	mustPut(t, s, 0, eris.BlockSize32KiB)
	must(t, s.Close())
	must(t, os.Remove(filepath.Join(directory, sumName)))
	s, err := Open(directory, Options{queueBytes: 1 << 18, checking: func(ctx context.Context) { <-ctx.Done() }})
	must(t, err)
	done := make(chan error, 100)
	for i := range cap(done) {
		go func() {
			ref, block := testBlock(i+1, eris.BlockSize32KiB)
			done <- s.Put(context.Background(), ref, block)
		}()
	}
	for s.room.TryAcquire(1) { // until there is no more room
		s.room.Release(1)
	}
	must(t, s.Close())
	for range cap(done) {
		if err := <-done; !errors.Is(err, context.Canceled) && !errors.Is(err, fetch.ErrClosed) {
			t.Errorf("Put: %v", err)
		}
	}
	mustHave(t, testOpen(t, directory, Options{}), 0, eris.BlockSize32KiB)
}

// TestFailedOpen fails to open a store after a crash, and then opens it: its index is checked entry
// by entry all the same, for nobody has done that.
func TestFailedOpen(t *testing.T) {
	directory := t.TempDir()
	s := testOpen(t, directory, Options{})
	mustPut(t, s, 0, eris.BlockSize1KiB)
	must(t, s.Close())
	sum, accessed := filepath.Join(directory, sumName), filepath.Join(directory, "accessed-1k")
	must(t, os.Remove(sum))
	must(t, os.Remove(accessed))
	must(t, os.Mkdir(accessed, 0o700))
	if s, err := Open(directory, Options{}); err == nil {
		t.Errorf("opened without %s: %v", accessed, s.Close())
	}
	if _, err := os.Stat(sum); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the index has a checksum, and was not checked: %v", err)
	}
	must(t, os.Remove(accessed))
	mustHave(t, testOpen(t, directory, Options{}), 0, eris.BlockSize1KiB)
}

// TestRemoved has the directory of an open store removed: what cannot last is not acknowledged.
func TestRemoved(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "store")
	s := testOpen(t, directory, Options{})
	mustPut(t, s, 0, eris.BlockSize1KiB)
	must(t, os.RemoveAll(directory))
	ref, block := testBlock(1, eris.BlockSize1KiB)
	if err := s.Put(t.Context(), ref, block); !errors.Is(err, os.ErrNotExist) || s.Err() == nil {
		t.Errorf("Put: %v; Err: %v", err, s.Err())
	}
	mustHave(t, s, 0, eris.BlockSize1KiB)
}
