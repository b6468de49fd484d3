// SPDX-License-Identifier: GPL-3.0-or-later

package fetch_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/sourcetest"
)

func TestWorkersConformance(t *testing.T) {
	sourcetest.Test(t, func(t *testing.T, backend *sourcetest.Backend) sourcetest.Fixture {
		return sourcetest.Fixture{Source: backend.Open(16), Held: 16}
	})
}

// deaf is a transport that takes no notice of the end of a context.
type deaf struct{ *fetch.Workers }

func (deaf) String() string { return "deaf:" }

// A call that does not return must not keep a request from being cancelled, nor write to its memory
// later.
func TestWorkersCancelDeaf(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	block := bytes.Repeat([]byte{1}, int(eris.BlockSize1KiB))
	source := deaf{fetch.NewWorkers(1, func(_ context.Context, _ eris.Reference, _ eris.BlockSize, dst []byte) ([]byte, error) {
		close(begun)
		<-end
		return append(dst, block...), nil
	})}
	memory := make([]byte, len(block))
	done := make(chan struct{})
	r := &fetch.Request{Size: eris.BlockSize1KiB, Dst: memory[:0], Done: func(*fetch.Request) { close(done) }}
	source.Start(r)
	<-begun
	source.Cancel(r)
	<-done
	if !errors.Is(r.Err, context.Canceled) {
		t.Errorf("the request ends with %v", r.Err)
	}
	source.Cancel(r) // does nothing
	close(end)
	if err := source.Close(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(memory, make([]byte, len(memory))) {
		t.Error("memory was written to after Done")
	}
}

// TestWorkersForget cancels requests that wait for a worker: nothing of them stays.
func TestWorkersForget(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	source := deaf{fetch.NewWorkers(1, func(_ context.Context, _ eris.Reference, _ eris.BlockSize, dst []byte) ([]byte, error) {
		close(begun)
		<-end
		return nil, eris.ErrNotFound
	})}
	start := func() *fetch.Request {
		r := &fetch.Request{Size: eris.BlockSize1KiB, Done: func(*fetch.Request) {}}
		source.Start(r)
		return r
	}
	start()
	<-begun
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	for range 100_000 {
		source.Cancel(start())
	}
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("%d bytes are left of requests that were cancelled", grown)
	}
	close(end)
	source.Close()
	source.Cancel(start()) // does nothing
}

func TestVerify(t *testing.T) {
	var requests []*fetch.Request
	const count = 200
	for i := range count {
		size := eris.BlockSize1KiB
		if i%3 == 0 {
			size = eris.BlockSize32KiB
		}
		block := bytes.Repeat([]byte{byte(i)}, int(size))
		r := &fetch.Request{Pair: eris.Pair{Reference: eris.Sum(block)}, Size: size, Block: block}
		switch i % 10 {
		case 1:
			block[i] ^= 1
		case 2:
			r.Block = block[1:]
		case 3:
			r.Err = eris.ErrNotFound
		}
		requests = append(requests, r)
	}
	fetch.Verify(requests)
	for i, r := range requests {
		var wrong *eris.BlockError
		switch i % 10 {
		case 1, 2:
			if !errors.As(r.Err, &wrong) || wrong.Reference != r.Pair.Reference {
				t.Errorf("%d: %v", i, r.Err)
			}
		case 3:
			if r.Err != eris.ErrNotFound {
				t.Errorf("%d: %v", i, r.Err)
			}
		default:
			if r.Err != nil {
				t.Errorf("%d: %v", i, r.Err)
			}
		}
	}
}
