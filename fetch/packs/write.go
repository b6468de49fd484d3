// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/dump"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/local"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
)

// packer writes a pack.
type packer struct {
	ctx     context.Context
	source  fetch.Source
	stream  dump.Stream
	length  int64 // of what has been written
	seen    map[eris.Reference]bool
	entries []entry
	leaves  []leaf // that are to be written yet
}

type leaf struct {
	ref  eris.Reference
	size eris.BlockSize
}

// write writes a pack of all blocks of what c denotes, which the source must have: of its contents,
// and if that is the index of a tree, of all files.
func write(ctx context.Context, w io.Writer, source fetch.Source, c eris.ReadCapability) error {
	k := &packer{ctx: ctx, source: source, seen: map[eris.Reference]bool{}}
	k.stream.W = writerFunc(func(b []byte) (int, error) {
		n, err := w.Write(b)
		k.length += int64(n)
		return n, err
	})
	if err := k.content(c); err != nil {
		return err
	}
	if err := k.inside(c); err != nil {
		return err
	}
	if err := k.putLeaves(); err != nil {
		return err
	}
	return k.stream.EndWith(appendTable(nil, k.entries))
}

// inside writes the index of a tree, and what is not leaves of the files.
func (k *packer) inside(c eris.ReadCapability) error {
	limits := erisfs.Limits{NarSize: 1 << 60} // the blocks are our own
	_, index, err := image.ReadIndex(k.ctx, k.source, c, limits, fetch.Window{})
	if err != nil || index == nil {
		return err
	}
	if err := k.putLeaves(); err != nil {
		return err
	}
	for c := range index.Contents() {
		if err := k.content(c); err != nil {
			return err
		}
	}
	return nil
}

// content writes the inner nodes of a content, and notes the leaves.
func (k *packer) content(c eris.ReadCapability) error {
	pairs := []eris.Pair{{Reference: c.Root, Key: c.Key}}
	for level := c.Level; level > 0; level-- {
		var below []eris.Pair
		for _, pair := range pairs {
			if k.seen[pair.Reference] {
				continue
			}
			block, err := k.put(leaf{pair.Reference, c.BlockSize})
			if err != nil {
				return err
			}
			plain := make([]byte, len(block))
			eris.Decrypt(plain, block, pair.Key, level)
			node, err := eris.ParseNode(plain)
			if err != nil {
				return err
			}
			for i := range node.Len() {
				below = append(below, node.Pair(i))
			}
		}
		pairs = below
	}
	for _, pair := range pairs {
		k.leaves = append(k.leaves, leaf{pair.Reference, c.BlockSize})
	}
	return nil
}

func (k *packer) putLeaves() error {
	for _, l := range k.leaves {
		if k.seen[l.ref] {
			continue
		}
		if _, err := k.put(l); err != nil {
			return err
		}
	}
	k.leaves = nil
	return nil
}

func (k *packer) put(l leaf) ([]byte, error) {
	if len(k.entries) == maxBlocks {
		return nil, errTooMany
	}
	block, err := fetch.Get(k.ctx, k.source, l.ref, l.size, nil)
	if err != nil {
		return nil, err
	}
	k.seen[l.ref] = true
	if err := k.stream.Put(k.ctx, l.ref, block); err != nil {
		return nil, err
	}
	k.entries = append(k.entries, newEntry(l.ref, k.length-int64(len(block)), len(block)))
	return block, nil
}

// writerFunc is a function as an io.Writer.
type writerFunc func(b []byte) (int, error)

// Write implements io.Writer.
func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

var errNoRoot = errors.New("which item the blocks belong to is not known; pack it by encode")

// spool is blocks that have been put, in a file that nobody else sees. It is a source.
type spool struct {
	*fetch.Workers
	file *os.File

	mu     sync.Mutex
	length int64
	blocks map[eris.Reference]entry
}

// newSpool makes the directory, but not its parents, and removes what a process has left there that
// was killed. Without one it is that of temporary files.
func newSpool(directory string) (*spool, error) {
	if directory != "" {
		if err := local.MakeDirectory(directory); err != nil {
			return nil, err
		}
		files.RemoveAbandoned(directory)
	}
	file, err := temporary(directory)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, err
	}
	s := &spool{file: file, blocks: map[eris.Reference]entry{}}
	s.Workers = fetch.NewWorkers("the blocks that were put", 1, s.get)
	return s, nil
}

func temporary(directory string) (*os.File, error) {
	name := files.TemporaryName(cmp.Or(directory, os.TempDir()))
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// Close implements [fetch.Source].
func (s *spool) Close() error {
	s.Workers.Close()
	return s.file.Close()
}

func (s *spool) put(ref eris.Reference, block []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.blocks[ref]; ok {
		return nil
	}
	if _, err := s.file.WriteAt(block, s.length); err != nil {
		return err
	}
	s.blocks[ref] = newEntry(ref, s.length, len(block))
	s.length += int64(len(block))
	return nil
}

func (s *spool) get(_ context.Context, ref eris.Reference, _ eris.BlockSize, dst []byte) ([]byte, error) {
	s.mu.Lock()
	e, ok := s.blocks[ref]
	s.mu.Unlock()
	if !ok {
		return nil, eris.ErrNotFound
	}
	block := dst[:e.Size()]
	_, err := s.file.ReadAt(block, e.Offset())
	return block, err
}

// Put implements [fetch.Store], but for that the block is not stored durably before [Store.Finish].
func (s *Store) Put(ctx context.Context, ref eris.Reference, block []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !eris.BlockSize(len(block)).Valid() {
		return eris.ErrBlockSize
	}
	if !s.url.Put {
		return fmt.Errorf("%v: %w", s, fetch.ErrReadOnly)
	}
	s.putting.Lock()
	defer s.putting.Unlock()
	if s.spool == nil {
		spool, err := newSpool(s.directory)
		if err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
		s.spool = spool
	}
	return s.spool.put(ref, block)
}

// Finish makes packs of what read capabilities denote, of which all blocks have been put, and
// stores them. Without any it is an error if blocks have been put.
func (s *Store) Finish(ctx context.Context, capabilities []eris.ReadCapability) error {
	s.putting.Lock()
	defer s.putting.Unlock()
	if s.spool == nil {
		return nil
	}
	if len(capabilities) == 0 {
		return fmt.Errorf("%v: %w", s, errNoRoot)
	}
	for _, c := range capabilities {
		if err := s.finish(ctx, c); err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
	}
	err := s.spool.Close()
	s.spool = nil
	return err
}

func (s *Store) finish(ctx context.Context, c eris.ReadCapability) (err error) {
	file, err := temporary(s.directory)
	if err != nil {
		return err
	}
	defer file.Close()
	defer os.Remove(file.Name()) // if it is there yet
	if s.directory == "" {
		os.Remove(file.Name()) // what is sent needs no name
	}
	sum := sha256.New()
	w := bufio.NewWriterSize(io.MultiWriter(file, sum), 1<<20)
	if err := write(ctx, w, s.spool, c); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	return s.objects.PutObject(ctx, c.Root.String()+suffix, file, size, [sha256.Size]byte(sum.Sum(nil)))
}
