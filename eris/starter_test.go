// SPDX-License-Identifier: GPL-3.0-or-later

package eris

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
)

// way is how a source is asked.
type way int

const (
	waiting way = iota // a goroutine per request
	started            // as a Starter
	fickle             // as a Starter that can not always be asked so, and whose requests fail now and then
)

// of returns a source that is asked so.
func (w way) of(blocks Blocks) Blocks {
	if w == waiting {
		return blocks
	}
	s := &starting{Blocks: blocks, fickle: w == fickle}
	if _, ok := blocks.(VerifiedBlocks); ok {
		return &verifiedStarting{s}
	}
	return s
}

func allWays(t *testing.T, test func(t *testing.T, way way)) {
	for i, name := range []string{"waiting", "started", "fickle"} {
		t.Run(name, func(t *testing.T) { test(t, way(i)) })
	}
}

func steadyWays(t *testing.T, test func(t *testing.T, way way)) {
	for i, name := range []string{"waiting", "started"} {
		t.Run(name, func(t *testing.T) { test(t, way(i)) })
	}
}

// starting makes a Starter of any source.
type starting struct {
	Blocks
	fickle bool
	n      atomic.Int64
}

type verifiedStarting struct{ *starting }

func (verifiedStarting) Verified() {}

func (s *starting) Starts() bool { return true }

func (s *starting) Start(ref Reference, size BlockSize, dst []byte, answered func()) Request {
	n := s.n.Add(1)
	if s.fickle && n%3 == 1 {
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &startedRequest{cancel: cancel}
	get := func() {
		if s.fickle && n%3 == 2 {
			r.err = errors.New("connection reset")
		} else {
			r.block, r.err = s.Get(ctx, ref, size, dst)
		}
		answered()
	}
	if s.fickle && n%2 == 0 {
		get() // before Start returns
	} else {
		go get()
	}
	return r
}

type startedRequest struct {
	cancel context.CancelFunc
	block  []byte
	err    error
}

func (r *startedRequest) Cancel() { r.cancel() }

func (r *startedRequest) Finish() ([]byte, error) {
	r.cancel()
	return r.block, r.err
}

func (r *startedRequest) Verified(err error) error { return err }
