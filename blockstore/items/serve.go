// SPDX-License-Identifier: GPL-3.0-or-later

package items

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

const (
	// batch is how many blocks a worker makes at a time: hashing them side by side takes a fraction
	// of the time.
	batch = 32
	// maxCandidates is how many entries are tried for one block. Many items may have the same file.
	maxCandidates = 64
)

// candidate is where a block may be.
type candidate struct {
	run   *run
	item  *item
	entry entry
}

// lookup is a request that a worker has taken.
type lookup struct {
	request    *fetch.Request
	candidates []candidate // that are to be tried; the first one is being
	found      int         // how many there were in all
	// It has been looked for in so many runs, from this one on.
	searched, first int
	block           []byte // before it is encrypted
}

// worker makes blocks. Its memory is used again.
type worker struct {
	table   *Table
	lookups [batch]lookup
	file    *os.File // the last one, nil if there is none
	size    int64
	run     *run // in whose paths it is, and where
	path    uint32
	keys    int // where keys begin, from there
	home    int // the run in which a block was found last, which mostly has the next one
}

// haveTime is for how long the answer to a question is looked for.
const haveTime = 25 * time.Millisecond

// Have implements [fetch.Haver] by the table: no file is looked at.
func (t *Table) Have(question []byte) []byte {
	t.mu.RLock()
	defer t.mu.RUnlock()
	begin := time.Now()
	var found []candidate
	return fetch.HaveBits(question, func(prefix []byte) (has, known bool) {
		found = found[:0]
		for _, r := range t.runs {
			var err error
			if found, err = r.find(found, binary.BigEndian.Uint64(prefix)); err != nil || len(found) > 0 {
				break
			}
		}
		return len(found) > 0, time.Since(begin) < haveTime
	})
}

// work answers requests until there are none.
func (t *Table) work() {
	w := worker{table: t}
	for {
		runtime.Gosched() // so that those who have an answer, or are about to ask, can: more at a time cost less
		t.queueMu.Lock()
		n := min(batch, len(t.queue))
		for i, r := range t.queue[:n] {
			w.lookups[i] = lookup{request: r, candidates: w.lookups[i].candidates[:0], first: w.home}
		}
		t.queue = append(t.queue[:0], t.queue[n:]...)
		if n == 0 {
			t.workers--
			t.queueMu.Unlock()
			return
		}
		t.queueMu.Unlock()
		w.answer(w.lookups[:n])
		w.closeFile() // what is removed meanwhile is to be found gone
	}
}

// answer answers requests.
func (w *worker) answer(lookups []lookup) {
	w.table.mu.RLock()
	defer w.table.mu.RUnlock()
	var pending [batch]*lookup
	n := len(lookups)
	for i := range lookups {
		pending[i] = &lookups[i]
	}
	// Each turn tries one candidate of each request.
	for n > 0 {
		var groups [3][]*lookup // leaves to be encrypted, and blocks of 1 KiB and of 32 KiB
		for _, l := range pending[:n] {
			switch {
			case !w.read(l):
				w.table.absent.Add(1)
				l.request.Fail(fmt.Errorf("block %v: %w", l.request.Pair.Reference, eris.ErrNotFound))
			case l.request.Size == eris.BlockSize32KiB:
				groups[2] = append(groups[2], l)
			case l.candidates[0].entry.kept() != 0, l.candidates[0].entry.number == innerNode:
				groups[1] = append(groups[1], l)
			default:
				groups[0] = append(groups[0], l)
			}
		}
		n = 0
		for i, group := range groups {
			n += copy(pending[n:], w.finish(group, i == 0))
		}
	}
}

// finish makes blocks of what has been read, answers the requests for those that are right, and
// returns the others.
func (w *worker) finish(lookups []*lookup, leaves bool) (wrong []*lookup) {
	var refs [batch]eris.Reference
	var blocks [batch][]byte
	for i, l := range lookups {
		blocks[i] = l.block
	}
	if n := len(lookups); leaves {
		eris.EncodeLeaves(refs[:n], blocks[:n], eris.ConvergenceSecret{})
	} else {
		eris.SumAll(refs[:n], blocks[:n])
	}
	for i, l := range lookups {
		if refs[i] == l.request.Pair.Reference {
			w.table.found.Add(1)
			l.request.Block, l.request.Err = l.block, nil
			l.request.Done(l.request)
			continue
		}
		// Anybody can ask for a reference that begins like another one; this says more.
		if c := l.candidates[0]; prefixOf(&refs[i]) != c.entry.prefix {
			if c.entry.kept() != 0 {
				w.table.damage(c.run)
			} else {
				w.changed(c.item)
			}
		}
		l.candidates = l.candidates[1:]
		wrong = append(wrong, l)
	}
	return wrong
}

// changed notes that an item is not what it was.
func (w *worker) changed(i *item) {
	i.gone.Store(true)
	w.table.changed.Store(true)
}

// read reads what the first candidate says that can be read, and reports whether there is one.
func (w *worker) read(l *lookup) bool {
	size := int(l.request.Size)
	l.block = l.request.Dst
	if cap(l.block) < size {
		l.block = make([]byte, size)
	}
	l.block = l.block[:size]
	for ; w.find(l); l.candidates = l.candidates[1:] {
		c := l.candidates[0]
		if c.item.gone.Load() {
			continue
		}
		if kept := c.entry.kept(); kept != 0 {
			if kept != l.request.Size {
				continue
			}
			if _, err := c.run.file.ReadAt(l.block, int64(c.entry.number)<<10); err != nil {
				w.table.damage(c.run)
				continue
			}
			return true
		}
		if w.readLeaf(l.block, c) {
			return true
		}
	}
	return false
}

// find looks for candidates, if there are none, in one run after the other, and reports whether
// there are some.
func (w *worker) find(l *lookup) bool {
	runs := w.table.runs
	for ; len(l.candidates) == 0 && l.found < maxCandidates && l.searched < len(runs); l.searched++ {
		n := (l.first + l.searched) % len(runs)
		var err error
		if l.candidates, err = runs[n].find(l.candidates[:0], prefixOf(&l.request.Pair.Reference)); err != nil {
			w.table.damage(runs[n])
		}
		if l.found += len(l.candidates); len(l.candidates) > 0 {
			w.home = n
		}
	}
	return len(l.candidates) > 0
}

// readLeaf reads the leaf of a file, and reports whether there is one of the size. One of 32 KiB is
// encrypted at once, with the key that the table has: to compute that takes as long as to check the
// reference.
func (w *worker) readLeaf(leaf []byte, c candidate) bool {
	if !w.open(c) || eris.BlockSizeFor(w.size) != eris.BlockSize(len(leaf)) {
		return false
	}
	if c.entry.number == innerNode {
		return w.makeNode(leaf, c)
	}
	offset := int64(c.entry.number) * int64(len(leaf))
	n, err := w.file.ReadAt(leaf, offset)
	switch {
	case err == io.EOF && offset+int64(n) == w.size:
		eris.PadLeaf(leaf, n)
	case err != nil:
		w.changed(c.item)
		return false
	}
	if len(leaf) == int(eris.BlockSize32KiB) {
		var key eris.Key
		if err := c.run.key(&key, c.entry, w.keys); err != nil {
			w.changed(c.item)
			return false
		}
		eris.Decrypt(leaf, leaf, key, 0)
	}
	return true
}

// makeNode makes an inner node of the file, and reports whether there is one.
func (w *worker) makeNode(node []byte, c candidate) (made bool) {
	if w.size > smallFile {
		w.changed(c.item)
		return false
	}
	_, err := eris.Encode(context.Background(), io.NewSectionReader(w.file, 0, w.size), func(_ context.Context, ref eris.Reference, block []byte) error {
		if prefixOf(&ref) == c.entry.prefix {
			made = copy(node, block) == len(node)
		}
		return nil
	}, eris.EncodeOptions{BlockSize: eris.BlockSize(len(node)), Workers: 1})
	if err != nil || !made {
		w.changed(c.item)
	}
	return err == nil && made
}

// open opens a file, if it is not the last one, which is mostly asked for again, and reports
// whether that can be.
func (w *worker) open(c candidate) bool {
	if w.file != nil && w.run == c.run && w.path == c.entry.path {
		return true
	}
	w.closeFile()
	below, err := c.run.path(c.entry)
	if err != nil {
		w.table.damage(c.run)
		return false
	}
	f, info, err := files.OpenRegular(filepath.Join(w.table.root, c.item.name, below), os.O_RDONLY|unix.O_NOFOLLOW)
	if errors.Is(err, fs.ErrNotExist) {
		w.changed(c.item)
	}
	if err != nil {
		return false
	}
	w.file, w.size, w.run, w.path, w.keys = f, info.Size(), c.run, c.entry.path, len(below)+1
	return true
}

func (w *worker) closeFile() {
	if w.file != nil {
		w.file.Close() // which was only read
		w.file = nil
	}
}
