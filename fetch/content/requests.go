// SPDX-License-Identifier: GPL-3.0-or-later

package content

import (
	"errors"
	"fmt"
	"runtime"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/internal/arrivals"
)

// This file is what a fetcher does with requests between their start and their end. Those in flight
// have no goroutine. Responses wait in a queue, from which as many goroutines as there are
// processors take some at a time, decrypt and check them, and start as many further requests, so
// that the lock of the fetcher, the connection below and the processor's vectors are used for many
// blocks at once. For 5 000 files of one to four blocks of 1 KiB this takes two thirds of the time
// of a goroutine per block.

const startBatch = 64

// request is a block that is needed: from the time that it is scheduled until its response has been
// dealt with.
type request struct {
	fetch.Call
	kind    requestKind
	content *content
	level   int
	node    int64  // of a nodeRequest, or of a leaf: its index in the level
	slot    uint64 // of a leafRequest
	buffer  *buffer
	near    bool // the buffer has the plaintext, and nothing was requested

	// Results at the end of a pathRequest: what of the leaf is content, and the length of the
	// content.
	tail   []byte
	length int64
}

// requestKind tells the uses of a block apart.
type requestKind int

const (
	pathRequest requestKind = iota // of the right-most path
	leftRequest                    // of the left-most path
	nodeRequest
	leafRequest
)

// newRequest returns a request that is not in use. There are as many as were ever in flight at a
// time.
func (f *fetcher) newRequest() *request {
	if n := len(f.unused); n > 0 {
		r := f.unused[n-1]
		f.unused = f.unused[:n-1]
		return r
	}
	r := &request{}
	r.Init(f.source, func() { f.responses.Add(r) })
	f.requests = append(f.requests, r)
	return r
}

// putRequest takes a request back.
func (f *fetcher) putRequest(r *request) {
	r.Reset()
	r.content, r.buffer, r.tail, r.near = nil, nil, nil, false
	f.unused = append(f.unused, r)
}

// dispatch starts requests as long as there is something to fetch and room for it. It is called and
// returns with the lock held, but gives it up meanwhile.
func (f *fetcher) dispatch() {
	if f.narrow {
		f.setBounds()
	}
	for f.err == nil {
		var batch [startBatch]*request
		n := 0
		for n < len(batch) && f.inFlight < f.most {
			r := f.newRequest()
			if !f.take(r) {
				f.putRequest(r)
				break
			}
			f.inFlight++
			batch[n] = r
			n++
		}
		if n == 0 {
			return
		}
		for f.decoders < runtime.GOMAXPROCS(0) {
			f.decoders++
			f.group.Go(f.decode)
		}
		f.mu.Unlock()
		for _, r := range batch[:n] {
			if r.near = r.readNear(); r.near {
				f.responses.Add(r)
			} else {
				r.Begin()
			}
		}
		f.mu.Lock()
	}
}

// readNear reads a leaf from what is near, if that has it. It reports whether it does.
func (r *request) readNear() bool {
	want := &r.content.want
	if r.level > 0 || r.node >= int64(len(want.NearKeys)) || want.NearKeys[r.node] != r.Pair.Key {
		return false
	}
	n, err := want.Near(r.buffer.data, r.node*int64(r.Size))
	if n < len(r.buffer.data) && err == nil {
		eris.PadLeaf(r.buffer.data, n)
	}
	return err == nil
}

// cancelAll cancels everything in flight. No request begins after it.
func (f *fetcher) cancelAll() {
	for _, r := range f.requests {
		r.Cancel()
	}
	f.endDecoders()
}

func (f *fetcher) endDecoders() {
	if f.err != nil && f.inFlight == 0 {
		f.responses.Close()
	}
}

// decode deals with responses until there will be no more. Called without the lock.
func (f *fetcher) decode() {
	for {
		var batch [arrivals.Batch]*request
		n, ok := f.responses.Take(batch[:])
		if !ok {
			return
		}
		decryptAll(batch[:n])
		f.mu.Lock()
		for _, r := range batch[:n] {
			f.end(r)
		}
		f.dispatch()
		f.wakeReader()
		f.mu.Unlock()
	}
}

// end puts the result of a request in its place, or ends everything because of its error.
func (f *fetcher) end(r *request) {
	f.inFlight--
	switch {
	case f.err != nil:
	case r.Err != nil:
		f.fail(r.Err)
	default:
		f.complete(r) // may fail, too
	}
	f.endDecoders()
	f.putRequest(r)
}

// decryptAll decrypts the blocks of requests that are done, checks what can be checked about them,
// and takes from them what a path needs. What is wrong becomes the error of the request. It needs
// no lock: of a content it uses what does not change, and the shape, which only the one request of
// its path uses.
func decryptAll(batch []*request) {
	var nodes [arrivals.Batch]*request
	var plaintexts [arrivals.Batch][]byte
	var sums [arrivals.Batch]eris.Reference
	n := 0
	for _, r := range batch {
		if r.Err = r.decrypt(); r.Err == nil && r.level > 0 {
			nodes[n], plaintexts[n] = r, r.buffer.data
			n++
		}
	}
	eris.SumAll(sums[:n], plaintexts[:n])
	for i, r := range nodes[:n] {
		r.Err = r.parse(eris.Key(sums[i]))
	}
}

// decrypt decrypts the block; of a node the rest is for parse to do.
func (r *request) decrypt() (err error) {
	switch {
	case r.near:
	case errors.As(r.Err, new(*eris.BlockError)): // names the block
		return r.Err
	case r.Err != nil:
		return fmt.Errorf("getting block %v: %w", r.Pair.Reference, r.Err)
	case len(r.Block) != int(r.Size):
		return &eris.BlockError{Reference: r.Pair.Reference, Length: len(r.Block), Want: r.Size}
	default:
		eris.Decrypt(r.buffer.data, r.Block, r.Pair.Key, r.level)
	}
	if r.level == 0 && r.kind == pathRequest {
		r.tail, r.length, err = r.content.shape.leaf(r.buffer.data)
	}
	return err
}

// parse checks a node that has been decrypted, and whose key should be the given one. Every
// internal node can be checked so, because the convergence secret has no part in its key; this
// finds trees that were forged below a root, and a wrong level or key in a capability.
func (r *request) parse(key eris.Key) (err error) {
	shape := &r.content.shape
	if key != r.Pair.Key {
		return shape.faultAt(r.Pair.Reference, errNodeKey)
	}
	node, err := eris.ParseNode(r.buffer.data)
	if err != nil {
		return shape.faultAt(r.Pair.Reference, err)
	}
	kin := &fetch.Kin{Refs: make([]eris.Reference, node.Len()), Origin: r.Origin}
	for i := range kin.Refs {
		kin.Refs[i] = node.Pair(i).Reference
	}
	r.buffer.node, r.buffer.kin = node, kin
	if r.kind == pathRequest {
		err = shape.node(r.level, node)
	} else if node.Len() != r.Size.Arity() {
		err = shape.faultAt(r.Pair.Reference, errNodePartial)
	}
	return err
}
