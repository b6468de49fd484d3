// SPDX-License-Identifier: GPL-3.0-or-later

// Package fetch says how blocks are asked for. There is one way: whoever wants a block makes a
// [Request], and starts it with a [Source]. Nothing waits, so that thousands of requests may be
// under way without a goroutine each. [Call] is that way for those who cancel requests at any time
// and use them again, [Get] for callers that want one block and have the time to wait, and
// [Workers] makes it of a transport whose calls wait.
//
// Packages below this one are sources: a transport each (coap, web, dir, dump, ipfs), and the pool
// that makes one source of many.
package fetch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// A Request asks a source for one block. Whoever makes it owns it, sets the first four fields, and
// hands it to one source at a time by [Source.Start]. From then on it is the source's, until that
// calls Done; afterwards it may be used again.
type Request struct {
	Pair eris.Pair        // the reference; and the key where it is known (else zero), for sources that have the plaintext
	Size eris.BlockSize   // that the block has
	Dst  []byte           // where the source may put the block: length 0, capacity at least Size. It may use other memory
	Done func(r *Request) // called once for each Start, from any goroutine, perhaps before Start returns

	// Root, if not zero, is the root of the item that the block belongs to, for sources that have
	// items as a whole.
	Root eris.Reference

	Block []byte // the result, in Dst or in memory that nobody changes; meaningless if Err is not nil
	Err   error  // why there is no block: wraps [eris.ErrNotFound] if the source does not have it

	// Kin, if not nil, is blocks of which this is the one at index Nth. Origin is, when Done has
	// been called, where the block has come from, for the Kin of those that it names; nil if it
	// does not matter. Only pools look at the first two, and set the last.
	Kin    *Kin
	Nth    int
	Origin any

	// Have, if not nil, has the source say which blocks it has, instead of getting one: it is the
	// question (see [HavePrefix]), and Block will be the answer. Size is then the greatest length
	// of that, and Pair is of no interest. It is only for sources whose method AsksHave returns
	// true; the error wraps [ErrCannotSay] if it turns out that whoever is behind the source does
	// not understand.
	Have []byte

	// Held is the source's own, from Start until Done.
	Held any

	outer []func(r *Request) // Done as it was before each stage that is in front of the source
}

// Fail ends a request without a block: it sets the fields and calls Done. It is for sources, in
// place of all else that they do at the end.
func (r *Request) Fail(err error) {
	r.Block, r.Err = nil, err
	r.Done(r)
}

// Window bounds what a reader has in flight.
type Window struct {
	Requests int
	Bytes    int64
	// Waited reports whether somebody waits for what is read. As long as nobody does, a reader uses
	// a quarter of its window; nil is that somebody does.
	Waited func() bool
}

// Source is where blocks come from. Its methods are safe for concurrent use. Nobody believes what
// it returns: the pool, or Get, verifies.
type Source interface {
	// Start begins to get a block. It never waits. The result is in the request when Done is
	// called: a block that need not be the right one, or an error. Errors that do not wrap
	// [eris.ErrNotFound] say nothing about the block; the source may work again later.
	//
	// Done must not wait, and call no method of the source that calls it: it notes the result, for
	// others to go on with.
	Start(r *Request)
	// Cancel makes the source call Done of a request that was started with it soon, whatever is
	// behind the source and however silent it is. It never waits. Once Done has been called it does
	// nothing, as long as the request has not been started again. Memory at Dst is not used any
	// more when Done is called. The error is mostly [context.Canceled] then.
	Cancel(r *Request)
	// String returns the URL of the source without anything secret, for messages.
	String() string
	// Close cancels all requests, and returns once nothing of the source is left running. What is
	// started later fails.
	Close() error
}

// Store is a source that takes blocks, too.
type Store interface {
	Source
	// Put stores a block. When it returns nil the block is stored durably, as far as the store can
	// tell. Errors wrap [ErrReadOnly] if the store takes no blocks from us, and the cause of ctx
	// when that is done.
	Put(ctx context.Context, ref eris.Reference, block []byte) error
}

// ErrReadOnly is wrapped by the errors of stores that take no blocks from us.
var ErrReadOnly = errors.New("store is read-only")

// ErrUnanswered is wrapped by the errors of a source that asks others, none of whom has said
// whether it has the block. It wraps [eris.ErrNotFound]: whoever wanted it goes elsewhere. But to
// ask again, for another size, is of no use now.
var ErrUnanswered = fmt.Errorf("%w: nobody has said to have it", eris.ErrNotFound)

// ErrClosed is the error of requests of a source that is closed.
var ErrClosed = errors.New("source is closed")

// A BusyError says that a source is there but does not answer now, as HTTP status 429 or 503, or
// CoAP 4.29 or 5.03. It says nothing about the block: whoever asked waits for After, asks for less
// at a time, or asks elsewhere, and does not count it as a failure of the source that answers
// others.
type BusyError struct {
	After time.Duration // how long the source asks to be left alone, bounded by whoever made the error; 0 if it does not say
	Err   error         // what it answered
	// Stopped tells that it has not answered that, but has given blocks a moment ago.
	Stopped bool
}

// Error implements error.
func (e *BusyError) Error() string {
	if e.After == 0 || errors.As(e.Err, new(*BusyError)) { // which says so
		return e.Err.Error()
	}
	return fmt.Sprintf("%v; to be asked again in %v", e.Err, e.After.Round(time.Millisecond))
}

// Unwrap returns what the source answered.
func (e *BusyError) Unwrap() error { return e.Err }

// Lacks reports whether an error says that a source does not have a block, or has another one in
// its place, perhaps one that was damaged.
func Lacks(err error) bool {
	return errors.Is(err, eris.ErrNotFound) || errors.As(err, new(*eris.BlockError))
}

// Get gets one block and waits for it. It may write it to dst, as a [Source] may. The block is
// verified: an [eris.BlockError] says that the source gave another. Other errors are those of the
// source, and the cause of ctx when that is done.
func Get(ctx context.Context, source Source, ref eris.Reference, size eris.BlockSize, dst []byte) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	r := &Request{Pair: eris.Pair{Reference: ref}, Size: size, Dst: dst[:0]}
	if cap(r.Dst) < int(size) {
		r.Dst = make([]byte, 0, size)
	}
	if Await(ctx, source, r); r.Err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	Verify([]*Request{r})
	return r.Block, r.Err
}

// Await starts a request, whose Done it sets, and returns when it is done; soon, once ctx is. What
// comes is not verified.
func Await(ctx context.Context, source Source, r *Request) {
	done := make(chan struct{})
	r.Done = func(*Request) { close(done) }
	source.Start(r)
	select {
	case <-done:
	case <-ctx.Done():
		source.Cancel(r)
		<-done
	}
}

// Verify checks the blocks of requests that are done, those without an error: many at a time take
// much less time than one by one. Where a block does not have the size and the reference that were
// asked for, it sets the error of the request to an [eris.BlockError]. Answers to Have are left
// alone. It is safe for concurrent use, with different requests.
func Verify(requests []*Request) {
	const most = 64
	for batch := range slices.Chunk(requests, most) {
		var blocks [most][]byte
		var sums [most]eris.Reference
		var checked [most]*Request
		n := 0
		for _, r := range batch {
			switch {
			case r.Err != nil, r.Have != nil:
			case len(r.Block) != int(r.Size):
				r.Err = &eris.BlockError{Reference: r.Pair.Reference, Length: len(r.Block), Want: r.Size}
			default:
				blocks[n], checked[n] = r.Block, r
				n++
			}
		}
		eris.SumAll(sums[:n], blocks[:n])
		for i, r := range checked[:n] {
			if sums[i] != r.Pair.Reference {
				r.Err = &eris.BlockError{Reference: r.Pair.Reference, Length: len(r.Block)}
			}
		}
	}
}
