// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// builder makes a run. It writes blocks as they come, and the rest at the end.
type builder struct {
	out  io.Writer
	root string

	mu      sync.Mutex // held by what is called while an item is encoded
	err     error      // of out
	blocks  int64      // bytes
	entries []entry
	paths   []byte
	full    bool // there are too many paths and keys
	items   []*item
}

func (b *builder) newItem(name string) *item {
	return &item{name: name, block: uint32(b.blocks >> 10), path: uint32(len(b.paths))}
}

// add encodes an item. If it cannot be encoded, nothing of it but blocks is in the run.
func (b *builder) add(ctx context.Context, name string) error {
	i, entries := b.newItem(name), len(b.entries)
	b.full = false
	e, err := publish.Encode(ctx, filepath.Join(b.root, name), b.put, erisfs.EncodeOptions{
		Workers: max(1, runtime.GOMAXPROCS(0)/2), File: b.file,
	})
	if err == nil && (b.full || b.blocks>>10 > maxPaths) {
		err = errors.New("it is too large")
	}
	if err != nil {
		b.entries, b.paths = b.entries[:entries], b.paths[:i.path]
		return err
	}
	if e.Form != "eris-fs" { // there are no files to take leaves from
		own := slices.DeleteFunc(b.entries[entries:], func(e entry) bool { return e.kept() == 0 })
		b.entries, b.paths = b.entries[:entries+len(own)], b.paths[:i.path]
	}
	b.items = append(b.items, i)
	return nil
}

// put is an [eris.Sink].
func (b *builder) put(_ context.Context, ref eris.Reference, block []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := entry{prefixOf(&ref), kept32KiB, uint32(b.blocks >> 10)}
	if eris.BlockSize(len(block)) == eris.BlockSize1KiB {
		e.path = kept1KiB
	}
	b.entries = append(b.entries, e)
	_, err := b.Write(block)
	return err
}

// Write writes a block, or a part of some.
func (b *builder) Write(p []byte) (n int, err error) {
	if b.err == nil {
		n, b.err = b.out.Write(p)
		b.blocks += int64(n)
	}
	return n, b.err
}

// file notes where the leaves of a file are, with their keys, and its inner nodes, if it is small.
func (b *builder) file(path string, size uint64) (eris.Sink, func(int64, []eris.Pair)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	offset := uint32(len(b.paths))
	b.paths = append(append(b.paths, path...), 0)
	keys, n := len(b.paths), uint64(0)
	if eris.BlockSizeFor(int64(size)) == eris.BlockSize32KiB {
		n = (size/uint64(eris.BlockSize32KiB) + 1) * uint64(len(eris.Key{})) // the last leaf is not full
	}
	if b.full = b.full || uint64(keys)+n > maxPaths; !b.full {
		b.paths = append(b.paths, make([]byte, n)...)
	}
	leaves := func(first int64, pairs []eris.Pair) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.full {
			return
		}
		for i := range pairs {
			if n > 0 {
				copy(b.paths[keys+(int(first)+i)*len(eris.Key{}):], pairs[i].Key[:])
			}
			if i == 0 || pairs[i].Reference != pairs[i-1].Reference { // files may be sparse
				b.entries = append(b.entries, entry{prefixOf(&pairs[i].Reference), offset, uint32(first + int64(i))})
			}
		}
	}
	if size > smallFile {
		return b.put, leaves
	}
	return func(_ context.Context, ref eris.Reference, _ []byte) error {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.entries = append(b.entries, entry{prefixOf(&ref), offset, innerNode})
		return nil
	}, leaves
}

// take takes over what is not gone of a run.
func (b *builder) take(r *run) error {
	moved := make([]*item, len(r.items))
	for n, i := range r.items {
		if i.gone.Load() {
			continue
		}
		moved[n] = b.newItem(i.name)
		block, path := r.ends(n)
		size := int64(block-i.block) << 10
		if _, err := io.CopyN(b, io.NewSectionReader(r.file, int64(i.block)<<10, size), size); err != nil {
			return err
		}
		b.paths = append(b.paths, make([]byte, path-i.path)...)
		if _, err := r.file.ReadAt(b.paths[moved[n].path:], r.blocks+r.entries*entrySize+int64(i.path)); err != nil {
			return err
		}
		b.items = append(b.items, moved[n])
	}
	in := bufio.NewReader(io.NewSectionReader(r.file, r.blocks, r.entries*entrySize))
	var memory [entrySize]byte
	for range r.entries {
		if _, err := io.ReadFull(in, memory[:]); err != nil {
			return err
		}
		e := parseEntry(memory[:])
		if n := r.owner(e); n < 0 || moved[n] == nil {
			continue
		} else if e.kept() != 0 {
			e.number += moved[n].block - r.items[n].block
		} else {
			e.path += moved[n].path - r.items[n].path
		}
		b.entries = append(b.entries, e)
	}
	return nil
}

// finish writes what stands behind the blocks.
func (b *builder) finish() error {
	slices.SortFunc(b.entries, entry.compare)
	sum := crc32.New(castagnoli)
	w := bufio.NewWriterSize(io.MultiWriter(b.out, sum), 64<<10)
	var memory []byte
	for _, e := range b.entries {
		memory = e.append(memory[:0])
		w.Write(memory) // errors are those of Flush
	}
	w.Write(b.paths)
	memory = memory[:0]
	for _, i := range b.items {
		memory = binary.BigEndian.AppendUint32(memory, i.block)
		memory = binary.BigEndian.AppendUint32(memory, i.path)
		memory = append(append(memory, byte(len(i.name))), i.name...)
	}
	w.Write(memory)
	footer := []byte(magic)
	for _, length := range []int64{b.blocks, int64(len(b.entries)), int64(len(b.paths)), int64(len(memory))} {
		footer = binary.BigEndian.AppendUint64(footer, uint64(length))
	}
	w.Write(footer)
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := b.out.Write(binary.BigEndian.AppendUint32(nil, sum.Sum32()))
	return err
}

// build makes a run of some items, and returns those that are left. Runs that are small, or mostly
// gone, become part of it, so that there are some 32 at most.
func (t *Table) build(ctx context.Context, names []string) (rest []string, err error) {
	limit := int64(runEntries)
	for _, r := range t.runs {
		limit += r.entries / 16
	}
	var old []*run
	path := filepath.Join(t.directory, strconv.Itoa(t.last+1)+suffix)
	err = files.Replace(path, 0o600, files.Options{Sync: true, Locked: true}, func(out io.Writer) error {
		b := builder{out: out, root: t.root}
		for _, r := range t.runs {
			if r.entries >= limit/2 && !r.wasted() {
				continue
			}
			if err := b.take(r); b.err != nil {
				return b.err
			} else if err != nil {
				t.damage(r)
				return fmt.Errorf("%s: %w", r.file.Name(), err)
			}
			old = append(old, r)
		}
		for len(names) > 0 && int64(len(b.entries)) < limit && len(b.paths) < maxPaths/2 {
			name := names[0]
			names = names[1:]
			err := b.add(ctx, name)
			if err != nil && (ctx.Err() != nil || b.err != nil) {
				return err
			} else if err != nil {
				t.skipped[name] = true
				t.log("%v; it is not shared", err)
			}
		}
		if len(b.items) == 0 {
			return errNothing
		}
		return b.finish()
	})
	switch {
	case errors.Is(err, errNothing):
		t.replace(old, nil)
		return names, nil
	case err != nil:
		return names, fmt.Errorf("writing the table of store items: %w", err)
	}
	t.last++
	r, err := load(path, t.last)
	if err == nil {
		t.replace(old, r)
	}
	return names, err
}

// errNothing keeps an empty run from being written.
var errNothing = errors.New("nothing to write")
