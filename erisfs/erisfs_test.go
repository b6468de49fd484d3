// SPDX-License-Identifier: GPL-3.0-or-later

package erisfs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/content"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

var must = testhelp.Must

// source opens a store in memory as a source.
func source(t testing.TB, b *sourcetest.Backend) fetch.Source {
	s := b.Open(16)
	t.Cleanup(func() { s.Close() })
	return s
}

// An example is a tree with what it is encoded as, in blocks of 1 KiB with the null convergence
// secret.
type example struct {
	name  string
	make  func(t testing.TB, path string)
	index string // hexadecimal
	urn   string
}

func write(t testing.TB, path, contents string, mode fs.FileMode) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(contents), mode))
}

func link(t testing.TB, target, path string) {
	t.Helper()
	must(t, os.Symlink(target, path))
}

const helloCapability = "0a003ffe034b0a056707d0ee1a67007ed97cec69cd4b887465b0bd3f76d228a9d96913e63264fc02e4b1063f436680d96b3313f634a511aff7b144003ba564632cdb"

var examples = []example{
	{
		name: "directory",
		make: func(t testing.TB, path string) {
			write(t, path+"/bin/hello", "Hello world!", 0o755)
			link(t, "hello", path+"/bin/hi")
			write(t, path+"/share/doc/README", "", 0o644)
		},
		index: "da65726974" + "8201a3" +
			"826362696e626869" + "82026568656c6c6f" +
			"826362696e6568656c6c6f" + "8201d901145842" + helloCapability +
			"8365736861726563646f6366524541444d45" + "8200d901145842" +
			"0a0032d1437e1496acc2ac9081a365aa9a3fb1dd019c2b855a171139f5805f172164bed078f1b8b012d6d5fc17bc925321b4c5ea6acc6286abf97edd96b7cb16e24f",
		urn: "urn:eris:BIAPRXKXSAITCVDSGUTIHOLXI5XRE67GC4NELQN4Z4PFZSMQ2WMIILGETY2NMHAITTSILZDWTKOFMNCOF2WK7VU2KQC6C5ENOSEG3KYMWQ",
	},
	{
		name:  "file",
		make:  func(t testing.TB, path string) { write(t, path, "Hello world!", 0o644) },
		index: "da65726974" + "8201a1" + "80" + "8200d901145842" + helloCapability,
		urn:   "urn:eris:BIAPBSYPINXOQ3FEAUZY2DCIHNWX7R7KWHMN2DWMS3K7AEKJMI4WPJRCRQKUVKSLHJVUO6QRBKHK3QM47HB4EXYMXXM4OGGYVJXN2X3VUI",
	},
	{
		name:  "link",
		make:  func(t testing.TB, path string) { link(t, "/gnu/store/x", path) },
		index: "da65726974" + "8201a1" + "80" + "82026c2f676e752f73746f72652f78",
		urn:   "urn:eris:BIAOOGZSHBQ4T7ACG7FLF6EUNC3LOQQ34NIM53K625KH3MSZAJLTLGN4M56T7Q2LY5DXLV5OJDR7VRVVJIHYDTFVV2RM4WKVRFWRCAFD2E",
	},
}

var wide = erisfs.Limits{NarSize: 1 << 30}

func archive(t testing.TB, nodes nar.Nodes) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := nar.Write(&b, nodes)
	must(t, err)
	return b.Bytes()
}

// open reads the index that a capability denotes and returns its tree.
func open(t testing.TB, b *sourcetest.Backend, c eris.ReadCapability, limits erisfs.Limits, window fetch.Window) (*erisfs.Tree, error) {
	t.Helper()
	ctx, s := context.Background(), source(t, b)
	r, err := content.Open(ctx, s, c, limits.IndexLength(), window)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	x, err := erisfs.ReadIndex(r, limits)
	if err != nil {
		return nil, err
	}
	tree := x.Nodes(ctx, s, limits, window)
	t.Cleanup(func() { tree.Close() })
	return tree, nil
}

func TestExamples(t *testing.T) {
	for _, e := range examples {
		t.Run(e.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "item")
			e.make(t, path)
			b := sourcetest.NewBackend()
			r, err := erisfs.Encode(context.Background(), nar.NewTree(path), b.Put, erisfs.EncodeOptions{})
			must(t, err)
			stored, err := content.Open(t.Context(), source(t, b), r.Capability, 1<<20, fetch.Window{})
			must(t, err)
			defer stored.Close()
			if got, err := io.ReadAll(stored); err != nil || hex.EncodeToString(got) != e.index {
				t.Errorf("index %x, error %v, want %s", got, err, e.index)
			}
			if got := r.Capability.URN(); got != e.urn {
				t.Errorf("URN %s, want %s", got, e.urn)
			}
			want := archive(t, nar.NewTree(path))
			if r.NarHash != sha256.Sum256(want) || r.NarSize != uint64(len(want)) {
				t.Errorf("NarHash %x, NarSize %d; want %x, %d", r.NarHash, r.NarSize, sha256.Sum256(want), len(want))
			}
			tree, err := open(t, b, r.Capability, erisfs.Limits{NarSize: r.NarSize}, fetch.Window{})
			must(t, err)
			if got := archive(t, tree); !bytes.Equal(got, want) {
				t.Error("another tree comes back")
			}
			// Without a store the capability is the same.
			if again, err := erisfs.Encode(context.Background(), nar.NewTree(path), nil, erisfs.EncodeOptions{Workers: 1}); err != nil || again.Capability != r.Capability {
				t.Errorf("second capability %v, error %v", again.Capability, err)
			}
		})
	}
}

// makeTree fills a directory with files of all kinds.
func makeTree(t testing.TB, root string, seed uint64, files, size int) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 2))
	dirs := []string{root}
	for i := range files {
		path := fmt.Sprintf("%s/%c é %d", dirs[random.IntN(len(dirs))], '!'+random.IntN(14), i)
		switch random.IntN(8) {
		case 0:
			dirs = append(dirs, path)
			write(t, path+"/x", "", 0o644)
		case 1:
			write(t, path, strings.Repeat("equal contents", 5000), 0o644)
		case 2:
			write(t, path+".dir/file", "x", 0o644)
			link(t, "../"+strings.Repeat("ö", 1+random.IntN(50)), path)
		default:
			n := random.IntN(size)
			if random.IntN(30) == 0 {
				n = random.IntN(100 * size)
			}
			b := make([]byte, n)
			for j := range b {
				b[j] = byte(random.IntN(256))
			}
			write(t, path, string(b), []fs.FileMode{0o644, 0o755}[random.IntN(2)])
		}
	}
}

func TestRoundTrip(t *testing.T) {
	root := t.TempDir() + "/item"
	makeTree(t, root, 1, 200, 40<<10)
	b := sourcetest.NewBackend()
	r, err := erisfs.Encode(context.Background(), nar.NewTree(root), b.Put, erisfs.EncodeOptions{})
	must(t, err)
	want := archive(t, nar.NewTree(root))
	for _, window := range []fetch.Window{{}, {Requests: 1, Bytes: 1}, {Requests: 3, Bytes: 200000}} {
		tree, err := open(t, b, r.Capability, erisfs.Limits{NarSize: r.NarSize}, window)
		must(t, err)
		if got := archive(t, tree); !bytes.Equal(got, want) {
			t.Errorf("window %+v: another tree comes back", window)
		}
	}
	// Contents may be passed over.
	tree, err := open(t, b, r.Capability, erisfs.Limits{NarSize: r.NarSize}, fetch.Window{})
	must(t, err)
	for nodes := 0; ; nodes++ {
		if _, err := tree.Next(); err == io.EOF {
			if nodes < 200 {
				t.Errorf("%d nodes", nodes)
			}
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	// A missing block of any file is an error, not another tree.
	for missing, block := range b.All() {
		without := sourcetest.NewBackend()
		for ref, block := range b.All() {
			if ref != missing {
				without.Set(ref, block)
			}
		}
		tree, err := open(t, without, r.Capability, erisfs.Limits{NarSize: r.NarSize}, fetch.Window{})
		if err == nil {
			_, err = nar.Write(io.Discard, tree)
			tree.Close() // nothing looks for blocks any more
		}
		if !errors.Is(err, eris.ErrNotFound) {
			t.Errorf("without block %v: error %v", missing, err)
		}
		if len(block) == 32<<10 {
			break
		}
	}
}

func TestNotRepresentable(t *testing.T) {
	for name, make := range map[string]func(path string){
		"empty root":      func(path string) { os.Mkdir(path, 0o755) },
		"empty directory": func(path string) { write(t, path+"/a", "", 0o644); os.MkdirAll(path+"/b/c", 0o755) },
		"name":            func(path string) { write(t, path+"/\xff", "", 0o644) },
		"directory name":  func(path string) { write(t, path+"/\xff/a", "", 0o644) },
		"link":            func(path string) { write(t, path+"/a", "", 0o644); link(t, "\xff", path+"/b") },
	} {
		path := filepath.Join(t.TempDir(), "item")
		make(path)
		if _, err := erisfs.Encode(context.Background(), nar.NewTree(path), nil, erisfs.EncodeOptions{}); !errors.Is(err, erisfs.ErrNotRepresentable) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestEncodeFailures(t *testing.T) {
	root := t.TempDir() + "/item"
	makeTree(t, root, 2, 50, 10<<10)
	full := errors.New("store is full")
	sink := eris.Sink(func(context.Context, eris.Reference, []byte) error { return full })
	if _, err := erisfs.Encode(context.Background(), nar.NewTree(root), sink, erisfs.EncodeOptions{}); !errors.Is(err, full) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := erisfs.Encode(ctx, nar.NewTree(root), nil, erisfs.EncodeOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if _, err := erisfs.Encode(context.Background(), nar.NewTree(root+"/absent"), nil, erisfs.EncodeOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestDecodeRejects(t *testing.T) {
	const (
		head = "da65726974" + "8201"
		file = "8200d901145842" + helloCapability
		sym  = "82026178" // link to x
	)
	tests := map[string]struct{ index, message string }{
		"nothing":                       {"", "unexpected EOF"},
		"cut":                           {head + "a1", "unexpected EOF"},
		"another tag":                   {"da65726973" + "8201a0", "where the tag of an index is expected"},
		"no tag":                        {"8201a0", "major type 4, where 6"},
		"array of three":                {"da65726974" + "8301a0", "3, where an array of two"},
		"version 0":                     {"da65726974" + "8200a0", "0, where version 1"},
		"version 2":                     {"da65726974" + "8202a0", "2, where version 1"},
		"version in two bytes":          {"da65726974" + "821801a0", "shortest form"},
		"indefinite map":                {head + "bf80" + file + "ff", "additional information 31"},
		"indefinite array":              {"da65726974" + "9f01a0ff", "additional information 31"},
		"map length not shortest":       {head + "b801" + "80" + file, "shortest form"},
		"map length of 8 bytes":         {head + "bb00000000ffffffff", "shortest form"},
		"huge map":                      {head + "bbffffffffffffffff", "entries, where an archive of"},
		"many entries that are missing": {head + "ba00100000", "unexpected EOF"},
		"reserved information":          {head + "bc", "additional information 28"},
		"something behind it":           {head + "a1" + "80" + file + "00", "1 bytes behind the index"},
		"text key":                      {head + "a1" + "6161" + file, "text string, where an array"},
		"integer key":                   {head + "a1" + "01" + file, "major type 0, where 4"},
		"bytes in a path":               {head + "a1" + "814161" + file, "major type 2, where 3"},
		"name length not shortest":      {head + "a1" + "81780161" + file, "shortest form"},
		"empty name":                    {head + "a1" + "8160" + file, "empty entry name"},
		"dot":                           {head + "a1" + "81612e" + file, `entry name "."`},
		"dot dot":                       {head + "a1" + "82616162" + "2e2e" + file, `entry name ".."`},
		"slash":                         {head + "a1" + "8163612f62" + file, "has the byte 0x2f"},
		"NUL":                           {head + "a1" + "8163610062" + file, "has the byte 0x00"},
		"long name":                     {head + "a1" + "81790100" + strings.Repeat("61", 256) + file, "text of 256 bytes"},
		"huge name":                     {head + "a1" + "817bffffffffffffffff", "text of 18446744073709551615 bytes"},
		"name that is not UTF-8":        {head + "a1" + "8161ff" + file, "not UTF-8"},
		"too many names":                {head + "a1" + "990fff", "path of 4095 names"},
		"long path":                     {head + "a1" + "91" + strings.Repeat("78fa"+strings.Repeat("61", 250), 17) + file, "longer than 3800"},
		"huge path":                     {head + "a1" + "9bffffffffffffffff", "path of 18446744073709551615 names"},
		"twice":                         {head + "a2" + "816161" + file + "816161" + sym, "not after"},
		"order":                         {head + "a2" + "816162" + file + "816161" + file, "not after"},
		"order by depth":                {head + "a2" + "8261616161" + file + "816162" + file, "not after"},
		"file as a directory":           {head + "a2" + "816161" + file + "8261616162" + file, `"a/b" is in "a"`},
		"link as a directory":           {head + "a3" + "816161" + sym + "816162" + file + "83616161626163" + file, `"a/b/c" is in "a"`},
		"root and an entry":             {head + "a2" + "80" + file + "816161" + file, `"a" is in ""`},
		"kind 3":                        {head + "a1" + "80" + "8203a0", "entries of kind 3"},
		"kind as text":                  {head + "a1" + "80" + "826161" + sym, "major type 3, where 0"},
		"entry of one":                  {head + "a1" + "80" + "8100", "1, where an array of two"},
		"entry of three":                {head + "a1" + "80" + "830061616161", "3, where an array of two"},
		"capability without tag":        {head + "a1" + "80" + "82005842" + helloCapability, "the tag of a read capability is expected: an item of major type 2, where 6"},
		"capability with another tag":   {head + "a1" + "80" + "8200d901155842" + helloCapability, "277, where the tag of a read capability"},
		"capability of 65 bytes":        {head + "a1" + "80" + "8200d901145841" + helloCapability[2:], "65, where a read capability"},
		"capability of another size":    {head + "a1" + "80" + "8200d901145842" + "0b" + helloCapability[2:], "entry"},
		"capability of a high level":    {head + "a1" + "80" + "8200d901145842" + "0aff" + helloCapability[4:], "entry"},
		"empty target":                  {head + "a1" + "80" + "820260", "empty symbolic link target"},
		"target with NUL":               {head + "a1" + "80" + "82026100", "NUL"},
		"target that is not UTF-8":      {head + "a1" + "80" + "820261ff", "not UTF-8"},
		"long target":                   {head + "a1" + "80" + "8202791000" + strings.Repeat("61", 4096), "text of 4096 bytes"},
		"target as bytes":               {head + "a1" + "80" + "82024161", "major type 2, where 3"},
	}
	for name, test := range tests {
		b, err := hex.DecodeString(test.index)
		if err != nil {
			t.Fatal(name, err)
		}
		_, err = erisfs.Decode(b, wide)
		testhelp.WantError(t, name, err, test.message)
	}
	// Every prefix of a good index is cut.
	for _, e := range examples {
		b, _ := hex.DecodeString(e.index)
		for n := range b {
			if _, err := erisfs.Decode(b[:n], wide); err == nil {
				t.Errorf("%s: %d of %d bytes are accepted", e.name, n, len(b))
			}
		}
	}
}

// TestConflicts has names whose order in an index is not that of an archive.
func TestOrder(t *testing.T) {
	file := func(path string) erisfs.Entry {
		return erisfs.Entry{Path: path, Kind: nar.Symlink, Target: "x"}
	}
	x, err := erisfs.Decode(erisfs.EncodeIndex([]erisfs.Entry{
		file("b"), file("a/b"), file("a-b"), file("a/a/a"), file("a.b"), file("a0"), file("aa/x"), file("a!"), file("a/\x01"),
	}), wide)
	must(t, err)
	tree := x.Nodes(context.Background(), source(t, sourcetest.NewBackend()), wide, fetch.Window{})
	defer tree.Close()
	a := archive(t, tree)
	// The reader of archives checks the order.
	if _, err := nar.Write(io.Discard, nar.NewReader(nar.NewReadAhead(t.Context(), bytes.NewReader(a), 2, 1000, 0))); err != nil {
		t.Error(err)
	}
	for _, entries := range [][]erisfs.Entry{
		{file("a"), file("a")},
		{file("a"), file("a/b")},
		{file("a"), file("a-b"), file("a/b")},
		{file(""), file("b")},
		{file("a/b"), file("a/b/c/d"), file("a/b.c")},
	} {
		if x, err := erisfs.Decode(erisfs.EncodeIndex(entries), wide); err == nil {
			t.Errorf("%v are accepted: %v", entries, x)
		}
	}
}

// TestLimits checks that an index is refused before it is worked through, and contents before they
// are fetched.
func TestLimits(t *testing.T) {
	root := t.TempDir() + "/item"
	write(t, root+"/large", strings.Repeat("x", 5<<20), 0o644)
	b := sourcetest.NewBackend()
	r, err := erisfs.Encode(context.Background(), nar.NewTree(root), b.Put, erisfs.EncodeOptions{})
	must(t, err)
	tree, err := open(t, b, r.Capability, erisfs.Limits{NarSize: 4 << 20}, fetch.Window{})
	if err == nil {
		_, err = nar.Write(io.Discard, tree)
	}
	if !errors.Is(err, content.ErrTooLarge) {
		t.Errorf("error %v", err)
	}
	var entries []erisfs.Entry
	for i := range 1000 {
		entries = append(entries, erisfs.Entry{Path: fmt.Sprint(i), Kind: nar.Symlink, Target: "x"})
	}
	index := erisfs.EncodeIndex(entries)
	_, err = erisfs.Decode(index, erisfs.Limits{NarSize: 1000 * 150})
	testhelp.WantError(t, "a small archive", err, "1000 entries")
	if _, err := erisfs.Decode(index, erisfs.Limits{NarSize: 1000 * 192}); err != nil {
		t.Error(err)
	}
}

// TestIndexMemory checks that an index takes little more memory than its bytes, whatever is in it.
func TestIndexMemory(t *testing.T) {
	// The shortest entries of all: links with short names and targets.
	const count = 300_000
	entries := make([]erisfs.Entry, count)
	for i := range entries {
		entries[i] = erisfs.Entry{Path: strconv.FormatInt(int64(i), 36), Kind: nar.Symlink, Target: "x"}
	}
	index := erisfs.EncodeIndex(entries)
	entries = nil
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	x, err := erisfs.Decode(index, erisfs.Limits{NarSize: count * 192})
	must(t, err)
	if taken := int64(heap() - before); taken > 4*count+(1<<20) {
		t.Errorf("the index has %d bytes, and %d beside it are in use", len(index), taken)
	}
	if x.Len() != count {
		t.Errorf("%d entries", x.Len())
	}

	// No index at all may take more than a small part of what is restored.
	for narSize, most := range map[uint64]int64{
		0: 1 << 20, 1 << 20: 5 << 20, 200 << 20: 25 << 20, 2 << 30: 32 << 20, 4 << 30: 40 << 20, 1<<64 - 1: 256 << 20,
	} {
		if got := (erisfs.Limits{NarSize: narSize}).IndexLength(); got > most {
			t.Errorf("an archive of %d bytes may have an index of %d", narSize, got)
		}
	}
	x.Entry(0)
}

// TestDirectoryBomb has an index of few bytes for a tree of many directories.
func TestDirectoryBomb(t *testing.T) {
	var entries []erisfs.Entry
	for i := range 500 {
		entries = append(entries, erisfs.Entry{Path: fmt.Sprint(i) + strings.Repeat("/d", 1800), Kind: nar.Symlink, Target: "x"})
	}
	index := erisfs.EncodeIndex(entries)
	x, err := erisfs.Decode(index, wide)
	must(t, err)
	tree := x.Nodes(context.Background(), source(t, sourcetest.NewBackend()), wide, fetch.Window{})
	defer tree.Close()
	size, err := nar.Write(io.Discard, tree)
	must(t, err)
	for narSize, want := range map[int64]bool{10 << 20: false, size / 2: false, size: true} {
		if _, err := erisfs.Decode(index, erisfs.Limits{NarSize: uint64(narSize)}); (err == nil) != want {
			t.Errorf("as an archive of %d bytes instead of %d: error %v", narSize, size, err)
		}
	}
}

func TestEmptyDirectoryIndex(t *testing.T) {
	b, _ := hex.DecodeString("da65726974" + "8201a0")
	x, err := erisfs.Decode(b, wide)
	must(t, err)
	tree := x.Nodes(context.Background(), source(t, sourcetest.NewBackend()), wide, fetch.Window{})
	defer tree.Close()
	if got := archive(t, tree); len(got) != 96 {
		t.Errorf("archive of %d bytes", len(got))
	}
}

func entriesOf(x *erisfs.Index) []erisfs.Entry {
	entries := make([]erisfs.Entry, x.Len())
	for i := range entries {
		entries[i] = x.Entry(i)
	}
	return entries
}

func FuzzDecode(f *testing.F) {
	for _, e := range examples {
		b, _ := hex.DecodeString(e.index)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := erisfs.Decode(b, wide)
		if err != nil {
			return
		}
		entries := entriesOf(x)
		// There is one encoding for each index.
		if again := erisfs.EncodeIndex(entries); !bytes.Equal(again, b) {
			t.Errorf("%x is accepted, but written as %x", b, again)
		}
		// The nodes are those of an archive: in order, and each directory ends.
		for i := 1; i < len(entries); i++ {
			if one, other := strings.Split(entries[i-1].Path, "/"), strings.Split(entries[i].Path, "/"); slices.Compare(one, other) >= 0 {
				t.Errorf("%x: %q before %q", b, one, other)
			}
		}
		tree := x.Nodes(context.Background(), source(t, sourcetest.NewBackend()), wide, fetch.Window{})
		defer tree.Close()
		depth := map[nar.Kind]int{}
		for err == nil {
			var n nar.Node
			n, err = tree.Next()
			depth[n.Kind]++
		}
		if !errors.Is(err, eris.ErrNotFound) && !errors.As(err, new(*content.Error)) && (err != io.EOF || depth[nar.Directory] != depth[nar.End]) {
			t.Errorf("%x: %v, %v", b, depth, err)
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	for _, bench := range []struct {
		name        string
		files, size int
	}{{"small", 2000, 20 << 10}, {"large", 2, 32 << 20}} {
		b.Run(bench.name, func(b *testing.B) {
			root := b.TempDir()
			contents := make([]byte, bench.size)
			for i := range bench.files {
				copy(contents, fmt.Sprint(i))
				write(b, fmt.Sprintf("%s/%d", root, i), string(contents), 0o644)
			}
			b.SetBytes(int64(bench.files * bench.size))
			for b.Loop() {
				_, err := erisfs.Encode(context.Background(), nar.NewTree(root), nil, erisfs.EncodeOptions{})
				must(b, err)
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	var entries []erisfs.Entry
	var c eris.ReadCapability
	raw, _ := hex.DecodeString(helloCapability)
	must(b, c.UnmarshalBinary(raw))
	for i := range 10000 {
		entries = append(entries, erisfs.Entry{Path: fmt.Sprintf("share/dir-%d/file-%d", i%100, i), Kind: nar.Regular, Capability: c})
	}
	index := erisfs.EncodeIndex(entries)
	b.SetBytes(int64(len(index)))
	b.ReportAllocs()
	for b.Loop() {
		_, err := erisfs.Decode(index, wide)
		must(b, err)
	}
}

// canceling is a base that ends a context when it is asked.
type canceling struct {
	cancel context.CancelFunc
	asked  atomic.Int32
}

func (c *canceling) File(string, bool) (nar.Node, nar.Feeder, func() bool, error) {
	c.asked.Add(1)
	c.cancel()
	return nar.Node{}, nil, nil, fs.ErrNotExist
}

func (c *canceling) ReadPart(string, []byte, int64) (int, error) { return 0, fs.ErrNotExist }

// TestUseEnds looks for no more files in a base when nobody waits for that any more.
func TestUseEnds(t *testing.T) {
	entries := make([]erisfs.Entry, 1000)
	for i := range entries {
		entries[i] = erisfs.Entry{Path: strconv.Itoa(i), Kind: nar.Regular, Capability: eris.ReadCapability{BlockSize: eris.BlockSize1KiB}}
	}
	x, err := erisfs.Decode(erisfs.EncodeIndex(entries), wide)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	tree := x.Nodes(ctx, source(t, sourcetest.NewBackend()), wide, fetch.Window{})
	defer tree.Close()
	base := &canceling{cancel: cancel}
	if err := tree.Use(ctx, base); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if n := base.asked.Load(); n > 100 {
		t.Errorf("%d files were looked for", n)
	}
}
