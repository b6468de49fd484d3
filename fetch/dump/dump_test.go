// SPDX-License-Identifier: GPL-3.0-or-later

package dump

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

func mustOpen(tb testing.TB, url string) *Store {
	tb.Helper()
	s, err := Open(url)
	must(tb, err)
	s.checkEvery = 0
	s.sync = func(*os.File) error { return nil } // which takes most of the time; there is no power cut in tests
	tb.Cleanup(func() { s.Close() })
	return s
}

// openBytes opens a dump that has the given bytes.
func openBytes(tb testing.TB, content []byte) (s *Store, path string) {
	tb.Helper()
	path = filepath.Join(tb.TempDir(), "dump.cbor")
	must(tb, os.WriteFile(path, content, 0o666))
	return mustOpen(tb, "dump:"+strings.ReplaceAll(path, "#", "%23")), path
}

func newCapability(n byte) eris.ReadCapability {
	return eris.ReadCapability{BlockSize: eris.BlockSize1KiB, Level: 1, Root: eris.Reference{n, 1}, Key: eris.Key{n, 2}}
}

func get(s *Store, ref eris.Reference, size eris.BlockSize) ([]byte, error) {
	return fetch.Get(context.Background(), s, ref, size, nil)
}

// pair is a pair of the map, with something behind it.
func pair(ref eris.Reference, block []byte, behind string) []byte {
	b := append([]byte{0x58, 32}, ref[:]...)
	b = append(b, 0x59, byte(len(block)>>8), byte(len(block)))
	return append(append(b, block...), behind...)
}

func TestConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
		path := filepath.Join(t.TempDir(), "dump.cbor")
		must(t, os.WriteFile(path, []byte("\xda\x65\x72\x69\x73\x9f\xbf\xff\xff"), 0o666))
		open := func(query string) *Store {
			s := mustOpen(t, "dump:"+path+query)
			s.Store = local.New(s.URL, sourcetest.Files{Files: adapter{s}, Backend: backend})
			return s
		}
		return sourcetest.Fixture{Source: open(""), ReadOnly: open("?get"), Held: 4}
	})
}

// worked is a dump that was made by hand from the grammar
// (https://eris.codeberg.page/eer/cbor.xml).
type worked struct {
	name    string
	dump    []byte
	blocks  int // how many of good are in it
	capable int
	format  bool // it is not a dump, or cut off
}

// goodBlocks are the blocks of the worked dumps: in 1 KiB and in 32 KiB.
func goodBlocks() (refs []eris.Reference, blocks [][]byte) {
	for i, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB, eris.BlockSize1KiB} {
		block := bytes.Repeat([]byte{byte(i + 1)}, int(size))
		refs, blocks = append(refs, eris.Sum(block)), append(blocks, block)
	}
	return refs, blocks
}

func workedDumps() []worked {
	refs, blocks := goodBlocks()
	join := func(parts ...any) []byte {
		var b []byte
		for _, part := range parts {
			switch p := part.(type) {
			case string:
				b = append(b, p...)
			case int:
				b = append(b, pair(refs[p], blocks[p], "")...)
			case []byte:
				b = append(b, p...)
			}
		}
		return b
	}
	binary := newCapability(1).AppendBinary(nil)
	capability := join("\xd9\x01\x14\x58\x42", binary)
	wrong := pair(refs[1], append(bytes.Clone(blocks[1][1:]), 9), "")
	wrong0 := pair(refs[0], append(bytes.Clone(blocks[0][1:]), 9), "")
	return []worked{
		{"as we write it", join("\xda\x65\x72\x69\x73\x9f\xbf", 0, 1, 2, "\xff", capability, "\xff"), 3, 1, false},
		{"definite", join("\x81\xa3", 0, 1, 2), 3, 0, false},
		{"definite, with both tags", join("\xd9\xd9\xf7\xda\x65\x72\x69\x73\x82\xa3", 0, 1, 2, capability), 3, 1, false},
		{"self-described only", join("\xd9\xd9\xf7\x9f\xa2", 0, 1, "\xff"), 2, 0, false},
		{"long heads", join("\x9b\x00\x00\x00\x00\x00\x00\x00\x02\xba\x00\x00\x00\x01", "\x5a\x00\x00\x00\x20", refs[0][:], "\x5b\x00\x00\x00\x00\x00\x00\x04\x00", blocks[0], capability), 1, 1, false},
		{"nothing in it", join("\xda\x65\x72\x69\x73\x9f\xbf\xff\xff"), 0, 0, false},
		{"nothing in it, definite", join("\x81\xa0"), 0, 0, false},
		{"a wrong block in between", join("\x9f\xbf", 0, wrong, 2, "\xff\xff"), 2, 0, false},
		{"the wrong one first", join("\x9f\xbf", wrong0, 0, 1, "\xff\xff"), 2, 0, false},
		{"the wrong one last", join("\x9f\xbf", 0, wrong0, 1, "\xff\xff"), 2, 0, false},
		{"duplicates", join("\xda\x65\x72\x69\x73\x9f\xbf", 0, 0, 1, 0, 1, "\xff", capability, capability, "\xff"), 2, 2, false},
		{"things that are no blocks", join("\x9f\xbf", "\x01\x02", 0, "\x61a\x82\x01\xa1\x01\x02", "\x41\x01\x58\x20", refs[1][:],
			"\x58\x20", refs[1][:], "\x43abc", "\x5f\x41a\x41b\xff\x7f\x61x\xff", 1, "\xff\x18\x2a\xf6", capability, "\xd9\x01\x14\x41\x00\xff"), 2, 1, false},
		{"a dump after another", join("\x81\xa1", 0, "\xda\x65\x72\x69\x73\x9f\xbf", 1, "\xff", capability, "\xff"), 2, 1, false},
		{"nothing at all", nil, 0, 0, true},
		{"an index of ERIS-FS", join("\xda\x65\x72\x69\x74\x82\x01\xa0"), 0, 0, true},
		{"an empty array", join("\x80"), 0, 0, true},
		{"an array of arrays", join("\x81\x81\xa0"), 0, 0, true},
		{"text", []byte("StorePath: /gnu/store/"), 0, 0, true},
		{"cut in a block", join("\xda\x65\x72\x69\x73\x9f\xbf", 0, pair(refs[1], blocks[1], "")[:2000]), 1, 0, true},
		{"a length that is not to be believed", join("\x9b\xff\xff\xff\xff\xff\xff\xff\xff\xbb\xff\xff\xff\xff\xff\xff\xff\xff", 0, "\x5b\xff\xff\xff\xff\xff\xff\xff\xff"), 1, 0, true},
		{"nested too deep", join("\x9f\xbf", 0, strings.Repeat("\x81", 100), "\xff\xff"), 1, 0, true},
		{"reserved length", join("\x9f\xbf", 0, "\x5c", "\xff\xff"), 1, 0, true},
		{"something behind it", join("\x81\xa1", 0, "\x00"), 1, 0, true},
	}
}

// read reads the right blocks of a dump one after the other.
func read(dump []byte) (blocks map[eris.Reference][]byte, capabilities []eris.ReadCapability, err error) {
	p := parser{file: bytes.NewReader(dump), size: int64(len(dump))}
	blocks = make(map[eris.Reference][]byte)
	for {
		l, err := p.next()
		if err != nil {
			return blocks, p.capabilities, err
		}
		if end := l.offset + int64(l.size); end <= p.size && eris.Verify(l.ref, dump[l.offset:end]) == nil {
			blocks[l.ref] = dump[l.offset:end]
		}
	}
}

func TestWorked(t *testing.T) {
	refs, good := goodBlocks()
	for _, w := range workedDumps() {
		t.Run(strings.ReplaceAll(w.name, " ", "_"), func(t *testing.T) {
			blocks, capabilities, err := read(w.dump)
			var format *FormatError
			if w.format != errors.As(err, &format) || !w.format && err != io.EOF {
				t.Errorf("parser: error is %v", err)
			}
			if len(blocks) != w.blocks || len(capabilities) != w.capable {
				t.Errorf("parser: %d blocks and %d capabilities", len(blocks), len(capabilities))
			}
			s, _ := openBytes(t, w.dump)
			found := 0
			for i, ref := range refs {
				got, err := get(s, ref, eris.BlockSize(len(good[i])))
				switch {
				case err == nil && bytes.Equal(got, good[i]):
					found++
				case w.format && w.blocks == 0 && errors.As(err, &format):
				case errors.Is(err, eris.ErrNotFound), errors.As(err, new(*eris.BlockError)):
				default:
					t.Errorf("Get: %v", err)
				}
			}
			if found != w.blocks {
				t.Errorf("Get finds %d blocks", found)
			}
		})
	}
}

// TestContinue puts blocks and a capability into each of the worked dumps that allows it: nothing
// that was good gets lost.
func TestContinue(t *testing.T) {
	for _, w := range workedDumps() {
		t.Run(strings.ReplaceAll(w.name, " ", "_"), func(t *testing.T) {
			before, capabilities, _ := read(w.dump)
			_, path := openBytes(t, w.dump)
			s := mustOpen(t, "dump:"+path+"?capability")
			ref, block := sourcetest.NewBlock(eris.BlockSize32KiB)
			if strings.HasPrefix(w.name, "definite") { // one who wrote it anew was killed
				must(t, os.WriteFile(filepath.Join(filepath.Dir(path), files.TemporaryPrefix+filepath.Base(path)), nil, 0o666))
			}
			err := s.Put(t.Context(), ref, block)
			if w.name == "things that are no blocks" || w.format && w.blocks == 0 && w.dump != nil {
				if !errors.Is(err, errForeign) && !errors.As(err, new(*FormatError)) {
					t.Errorf("error is %v", err)
				}
				if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, w.dump) {
					t.Errorf("the file was changed, %v", err)
				}
				return
			}
			must(t, err)
			must(t, s.Finish(t.Context(), []eris.ReadCapability{newCapability(9)}))
			must(t, s.Finish(t.Context(), []eris.ReadCapability{newCapability(9)}))
			dump, err := os.ReadFile(path)
			must(t, err)
			after, now, err := read(dump)
			if err != io.EOF {
				t.Errorf("what was written is no dump: %v", err)
			}
			before[ref] = block
			if !maps.EqualFunc(before, after, bytes.Equal) {
				t.Errorf("%d blocks instead of %d", len(after), len(before))
			}
			if !slices.Equal(now, append(capabilities, newCapability(9))) {
				t.Errorf("capabilities are %v", now)
			}
			if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
				t.Errorf("%v is left, %v", left, err)
			}
		})
	}
}

// TestWritten checks every byte of what is written (https://eris.codeberg.page/eer/cbor.xml).
func TestWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new dump.cbor")
	s := mustOpen(t, "dump:"+strings.ReplaceAll(path, " ", "%20")+"?get&put&capability")
	refs, blocks := goodBlocks()
	want := "\xda\x65\x72\x69\x73\x9f\xbf"
	for i := range refs {
		for range 2 {
			must(t, s.Put(t.Context(), refs[i], blocks[i]))
		}
		want += string(pair(refs[i], blocks[i], ""))
		if got, err := os.ReadFile(path); err != nil || string(got) != want+"\xff\xff" {
			t.Fatalf("after %d blocks: something else is written, %v", i+1, err)
		}
	}
	want += "\xff"
	for n := range byte(3) {
		must(t, s.Finish(t.Context(), []eris.ReadCapability{newCapability(n)}))
		binary := newCapability(n).AppendBinary(nil)
		want += "\xd9\x01\x14\x58\x42" + string(binary)
		if got, err := os.ReadFile(path); err != nil || string(got) != want+"\xff" {
			t.Fatalf("after %d capabilities: something else is written, %v", n+1, err)
		}
	}
	// Without being asked for, no capability is written.
	other := filepath.Join(t.TempDir(), "other.cbor")
	silent := mustOpen(t, "dump:"+other)
	must(t, silent.Finish(t.Context(), []eris.ReadCapability{newCapability(1)}))
	if _, err := os.Stat(other); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a file: %v", err)
	}
}

// TestCutEverywhere cuts a dump off at every byte where something happens: what is whole is found,
// and with another block put into it, the dump is whole again.
func TestCutEverywhere(t *testing.T) {
	refs, blocks := goodBlocks()
	dump := []byte("\xda\x65\x72\x69\x73\x9f\xbf")
	var ends []int
	for _, i := range []int{0, 2} {
		dump = append(dump, pair(refs[i], blocks[i], "")...)
		ends = append(ends, len(dump))
	}
	capability := newCapability(1)
	dump = appendEnd(dump, []eris.ReadCapability{capability})
	path := filepath.Join(t.TempDir(), "dump.cbor")
	for cut := range len(dump) {
		if cut%7 != 0 && cut > 60 && cut < ends[1]-40 && (cut < ends[0]-40 || cut > ends[0]+60) {
			continue // in the middle of a block
		}
		must(t, os.WriteFile(path, dump[:cut], 0o666))
		s := mustOpen(t, "dump:"+path)
		whole := 0
		for n, i := range []int{0, 2} {
			_, err := get(s, refs[i], eris.BlockSize1KiB)
			if (err == nil) != (cut >= ends[n]) {
				t.Errorf("cut at %d: block %d: %v", cut, i, err)
			}
			if err == nil {
				whole++
			}
		}
		err := s.Put(t.Context(), refs[1], blocks[1])
		if cut > 0 && cut < 7 {
			if !errors.As(err, new(*FormatError)) {
				t.Errorf("cut at %d: %v", cut, err)
			}
		} else if err != nil {
			t.Errorf("cut at %d: %v", cut, err)
		} else {
			again, err := os.ReadFile(path)
			got, _, formatErr := read(again)
			if err != nil || formatErr != io.EOF || len(got) != whole+1 {
				t.Errorf("cut at %d: afterwards there are %d blocks, %v, %v", cut, len(got), err, formatErr)
			}
		}
		s.Close()
	}
}

// TestInterrupted plays a commit that is interrupted after any number of its bytes, in the order in
// which they are written: until its last step, what was there before is there, capabilities
// included.
func TestInterrupted(t *testing.T) {
	refs, blocks := goodBlocks()
	capabilities := []eris.ReadCapability{newCapability(1), newCapability(2)}
	base := append([]byte("\xda\x65\x72\x69\x73\x9f\xbf"), pair(refs[0], blocks[0], "")...)
	old := appendEnd(bytes.Clone(base), capabilities)
	batch := appendEnd(pair(refs[2], blocks[2], ""), capabilities)
	first := len(old) - len(base) // how much of the batch overwrites the old end
	for written := 0; written <= len(batch)-first; written += 5 {
		file := append(bytes.Clone(old), batch[first:first+written]...)
		s, path := openBytes(t, file)
		if _, err := get(s, refs[0], eris.BlockSize1KiB); err != nil {
			t.Errorf("after %d bytes: %v", written, err)
		}
		if err := s.Put(t.Context(), refs[1], blocks[1]); err != nil {
			t.Errorf("after %d bytes: %v", written, err)
			continue
		}
		again, err := os.ReadFile(path)
		got, now, formatErr := read(again)
		if err != nil || formatErr != io.EOF || len(got) != 2 || !slices.Equal(now, capabilities) {
			t.Errorf("after %d bytes: then there are %d blocks and %d capabilities, %v, %v", written, len(got), len(now), err, formatErr)
		}
		s.Close()
	}
	// What looks like the beginning of another dump, as bytes of a block may, is overwritten as
	// well; but not if it has blocks.
	s, path := openBytes(t, append(bytes.Clone(old), "\x9f\xbf\x01\x02\x5b"...))
	must(t, s.Put(t.Context(), refs[1], blocks[1]))
	if again, err := os.ReadFile(path); err != nil || len(again) != len(old)+len(pair(refs[1], blocks[1], "")) {
		t.Errorf("the file has %d bytes, %v", len(again), err)
	}
	s, _ = openBytes(t, append(append(bytes.Clone(old), "\x9f\xbf"...), pair(refs[2], blocks[2], "\x01")...))
	if err := s.Put(t.Context(), refs[1], blocks[1]); !errors.Is(err, errDamaged) {
		t.Errorf("error is %v", err)
	}
	if _, err := get(s, refs[2], eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
}

// TestChanged has the file change behind the store's back.
func TestChanged(t *testing.T) {
	refs, blocks := goodBlocks()
	one, two := pair(refs[0], blocks[0], ""), pair(refs[1], blocks[1], "")
	s, path := openBytes(t, append([]byte("\x81\xa1"), one...))
	if _, err := get(s, refs[1], eris.BlockSize32KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
	must(t, os.WriteFile(path, append([]byte("\x81\xa1"), two...), 0o666))
	if _, err := get(s, refs[1], eris.BlockSize32KiB); err != nil {
		t.Error(err)
	}
	if _, err := get(s, refs[0], eris.BlockSize1KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
	must(t, os.Remove(path))
	if _, err := get(s, refs[1], eris.BlockSize32KiB); !errors.Is(err, os.ErrNotExist) || errors.Is(err, eris.ErrNotFound) {
		t.Errorf("error is %v", err)
	}
	// While it is being written, the file may be neither replaced nor locked by another writer.
	w := mustOpen(t, "dump:"+path)
	must(t, w.Put(t.Context(), refs[0], blocks[0]))
	if err := mustOpen(t, "dump:"+path).Put(t.Context(), refs[1], blocks[1]); !errors.Is(err, errLocked) {
		t.Errorf("a second writer: %v", err)
	}
	must(t, os.WriteFile(path, append([]byte("\x81\xa1"), two...), 0o666))
	if err := w.Put(t.Context(), refs[2], blocks[2]); !errors.Is(err, errChanged) {
		t.Errorf("the file was changed: %v", err)
	}
	must(t, w.Put(t.Context(), refs[2], blocks[2]))
	dump, err := os.ReadFile(path)
	got, _, formatErr := read(dump)
	if err != nil || formatErr != io.EOF || len(got) != 2 {
		t.Errorf("%d blocks, %v, %v", len(got), err, formatErr)
	}
}

// TestCutMeanwhile has the file cut off, or made anew, between two looks at it.
func TestCutMeanwhile(t *testing.T) {
	refs, blocks := goodBlocks()
	one, two := pair(refs[0], blocks[0], ""), pair(refs[1], blocks[1], "")
	for _, now := range [][]byte{append([]byte("\x81\xa2"), one...), append([]byte("\x81\xa1"), one...)} {
		s, path := openBytes(t, slices.Concat([]byte("\x81\xa2"), one, two))
		s.checkEvery = time.Hour
		if _, err := get(s, refs[0], eris.BlockSize1KiB); err != nil {
			t.Error(err)
		}
		must(t, os.WriteFile(path, now, 0o666))
		if _, err := get(s, refs[1], eris.BlockSize32KiB); !errors.Is(err, eris.ErrNotFound) {
			t.Error(err)
		}
	}
}

// TestGetMeanwhile gets a block while another one is put: the dump, which may be long, is not read
// through for that. What somebody else does to it afterwards is noticed.
func TestGetMeanwhile(t *testing.T) {
	refs, blocks := goodBlocks()
	s, path := openBytes(t, slices.Concat([]byte("\x9f\xbf"), pair(refs[0], blocks[0], "\xff\xff")))
	syncs := 0
	s.sync = func(*os.File) error {
		syncs++
		s.reading.RLock()
		known := s.contents
		s.reading.RUnlock()
		if _, err := get(s, refs[0], eris.BlockSize1KiB); err != nil {
			t.Error(err)
		}
		s.reading.RLock()
		defer s.reading.RUnlock()
		if s.contents != known {
			t.Error("the dump was read through again")
		}
		return nil
	}
	must(t, s.Put(t.Context(), refs[1], blocks[1]))
	if syncs == 0 {
		t.Error("nothing was made durable")
	}
	must(t, os.WriteFile(path, append([]byte("\x81\xa1"), pair(refs[2], blocks[2], "")...), 0o666))
	s.checkEvery = time.Hour
	if _, err := get(s, refs[1], eris.BlockSize32KiB); !errors.Is(err, eris.ErrNotFound) {
		t.Error(err)
	}
}

// TestNoFile has things in the place of the dump that are no files.
func TestNoFile(t *testing.T) {
	ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
	directory := t.TempDir()
	for _, path := range []string{directory, "/dev/null", filepath.Join(directory, "no", "such", "directory")} {
		s := mustOpen(t, "dump:"+path)
		if _, err := get(s, ref, eris.BlockSize1KiB); err == nil || errors.Is(err, eris.ErrNotFound) {
			t.Errorf("%s: Get: %v", path, err)
		}
		if err := s.Put(t.Context(), ref, block); err == nil {
			t.Errorf("%s: Put did not fail", path)
		}
	}
	if os.Geteuid() != 0 {
		path := filepath.Join(directory, "read-only.cbor")
		must(t, os.WriteFile(path, []byte("\x81\xa0"), 0o444))
		if err := mustOpen(t, "dump:"+path).Put(t.Context(), ref, block); !errors.Is(err, fetch.ErrReadOnly) {
			t.Errorf("read-only file: %v", err)
		}
	}
	for _, url := range []string{"dump:", "file:x", "dump://host/x", "dump:x?layout=flat"} {
		if s, err := Open(url); err == nil {
			s.Close()
			t.Errorf("%s is taken", url)
		}
	}
}

// TestManyDuplicates checks that a dump of the same block again and again takes the memory of one.
func TestManyDuplicates(t *testing.T) {
	refs, blocks := goodBlocks()
	dump := []byte("\x9f\xbf")
	for i := range 2000 {
		wrong := bytes.Clone(blocks[0])
		binary.BigEndian.PutUint64(wrong, uint64(i))
		dump = append(dump, pair(refs[0], wrong, "")...)
	}
	dump = append(dump, pair(refs[0], blocks[0], "")...)
	dump = append(dump, pair(refs[0], make([]byte, 1024), "\xff\xff")...)
	s, _ := openBytes(t, dump)
	if _, err := get(s, refs[0], eris.BlockSize1KiB); err != nil {
		t.Error(err)
	}
	if n := len(s.contents.blocks); n != 1 {
		t.Errorf("%d places are known", n)
	}
}

// FuzzDump reads whatever bytes as a dump: the store has the right blocks that are in it, and a
// dump that can be continued has them still when that has been done.
func FuzzDump(f *testing.F) {
	for _, w := range workedDumps() {
		if len(w.dump) < 8000 {
			f.Add(w.dump)
		}
	}
	f.Fuzz(func(t *testing.T, dump []byte) {
		blocks, capabilities, _ := read(dump)
		s, path := openBytes(t, dump)
		defer s.Close()
		for ref, block := range blocks {
			if _, err := get(s, ref, eris.BlockSize(len(block))); err != nil {
				t.Errorf("the store does not find a block that the reader finds: %v", err)
			}
		}
		ref, block := sourcetest.NewBlock(eris.BlockSize1KiB)
		if err := s.Put(t.Context(), ref, block); err != nil {
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, dump) {
				t.Errorf("Put failed but changed the file: %v", err)
			}
			return
		}
		after, err := os.ReadFile(path)
		must(t, err)
		more, now, err := read(after)
		if err != io.EOF || len(more) != len(blocks)+1 || more[ref] == nil {
			t.Errorf("%d blocks, then %d, %v", len(blocks), len(more), err)
		}
		if len(now) > len(capabilities) {
			t.Errorf("%d capabilities, then %d", len(capabilities), len(now))
		}
	})
}

// What is written to a stream is read from one, however it is cut into pieces, and wherever the
// stream is cut off, all blocks that are whole have been handed over and the error says so.
func TestStream(t *testing.T) {
	var out bytes.Buffer
	s := Stream{W: &out, KeepCapabilities: true}
	var refs []eris.Reference
	var ends []int // of blocks in the stream
	for i, size := range []eris.BlockSize{eris.BlockSize1KiB, eris.BlockSize32KiB, eris.BlockSize1KiB} {
		block := bytes.Repeat([]byte{byte(i)}, int(size))
		refs = append(refs, eris.Sum(block))
		must(t, s.Put(t.Context(), refs[i], block))
		ends = append(ends, out.Len())
	}
	c := eris.ReadCapability{BlockSize: eris.BlockSize1KiB, Root: refs[0]}
	must(t, s.Finish(t.Context(), []eris.ReadCapability{c}))
	if err := s.Put(t.Context(), refs[0], make([]byte, 1024)); err == nil {
		t.Error("a block was put behind the end")
	}
	read := func(r io.Reader) (n int, capabilities []eris.ReadCapability, err error) {
		capabilities, err = Read(r, func(ref eris.Reference, block []byte) error {
			if ref != refs[n] || eris.Verify(ref, block) != nil {
				t.Fatalf("block %d is another one", n)
			}
			n++
			return nil
		})
		return n, capabilities, err
	}
	whole := out.Bytes()
	for _, r := range []io.Reader{bytes.NewReader(whole), iotest.OneByteReader(bytes.NewReader(whole)), iotest.DataErrReader(bytes.NewReader(whole))} {
		if n, capabilities, err := read(r); n != len(refs) || err != nil || len(capabilities) != 1 || capabilities[0] != c {
			t.Errorf("%d blocks, %v, %v", n, capabilities, err)
		}
	}
	for length := range whole {
		isNear := func(end int) bool { return max(length-end, end-length) < 60 }
		if length%61 != 0 && !slices.ContainsFunc(append(ends, 0, len(whole)), isNear) {
			continue // in the middle of a block
		}
		n, _, err := read(bytes.NewReader(whole[:length]))
		want := 0
		for want < len(ends) && ends[want] <= length {
			want++
		}
		var format *FormatError
		if n != want || !errors.As(err, &format) || format.Err != io.ErrUnexpectedEOF {
			t.Fatalf("of %d bytes there are %d blocks instead of %d: %v", length, n, want, err)
		}
	}
	broken := errors.New("broken")
	if n, _, err := read(io.MultiReader(bytes.NewReader(whole[:ends[0]+9]), iotest.ErrReader(broken))); n != 1 || !errors.Is(err, broken) {
		t.Errorf("%d blocks, %v", n, err)
	}
	if _, _, err := read(bytes.NewReader([]byte("Hello, world."))); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("text is taken for a dump: %v", err)
	}
}
