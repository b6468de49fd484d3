// SPDX-License-Identifier: GPL-3.0-or-later

// Package ratelimit bounds how many bytes per second go through what shares a [Limiter]. Start with
// [New].
package ratelimit

import (
	"context"
	"io"
	"math"
	"sync"
	"time"
)

// Bounds of the parts of a stream that are let through at once, and the least burst where none is
// given, in bytes.
const (
	leastChunk = 1 << 10
	mostChunk  = 256 << 10
	leastBurst = 32 << 10 // a block of the larger size
)

// A Limiter is a bucket into which tokens flow at a steady rate, one for each byte. It is safe for
// concurrent use, and meant to be shared. Whoever comes takes the tokens at once, even those that
// are still to flow in, and waits until they are there: nobody starves, and many users get equal
// shares of equal demands.
type Limiter struct {
	rate  float64       // bytes per second
	burst time.Duration // how long a full bucket has taken to fill
	chunk int

	mu    sync.Mutex
	spent time.Time // when all tokens that were taken have flowed in, and the bucket is empty
}

// New returns a limiter to rate bytes per second, or nil, which is no limit, if rate is 0 or less.
// Burst is how many bytes may go at full speed after a pause; if it is 0 or less it is what a tenth
// of a second brings, at least 32 KiB.
func New(rate, burst int64) *Limiter {
	if rate <= 0 {
		return nil
	}
	if burst <= 0 {
		burst = max(rate/10, leastBurst)
	}
	l := &Limiter{rate: float64(rate)}
	l.burst = l.duration(burst)
	l.chunk = int(min(max(rate/64, leastChunk), mostChunk))
	l.spent = time.Now().Add(-l.burst)
	return l
}

// duration returns how long n tokens take to flow in.
func (l *Limiter) duration(n int64) time.Duration {
	d := float64(n) / l.rate * float64(time.Second)
	return time.Duration(min(d, math.MaxInt64/8))
}

// Take takes n tokens and returns how long it takes until they are there, for callers that wait by
// other means.
func (l *Limiter) Take(n int) time.Duration {
	d := l.duration(int64(n))
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if full := now.Add(-l.burst); l.spent.Before(full) {
		l.spent = full
	}
	l.spent = l.spent.Add(d)
	return l.spent.Sub(now)
}

// Return gives back n tokens that were taken but not used, for example because what was to be sent
// does not exist; to no limiter it gives nothing. Those who wait already do not wait less.
func (l *Limiter) Return(n int) {
	if l == nil {
		return
	}
	d := l.duration(int64(n))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spent = l.spent.Add(-d)
}

// Reader returns a reader of r whose bytes count. When ctx is done while bytes that were read wait
// to be let through, Read returns them with the cause of ctx.
func Reader(ctx context.Context, r io.Reader, l *Limiter) io.Reader {
	if l == nil {
		return r
	}
	return &reader{ctx, r, l}
}

type reader struct {
	ctx     context.Context
	r       io.Reader
	limiter *Limiter
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p[:min(len(p), r.limiter.chunk)])
	if _, e := r.limiter.Wait(r.ctx, n); e != nil {
		err = e
	}
	return n, err
}

// Wait takes n tokens and waits until they are there, or returns the cause of ctx. With no Limiter
// it does nothing.
func (l *Limiter) Wait(ctx context.Context, n int) (took time.Duration, err error) {
	if l == nil {
		return 0, nil
	}
	if took = l.Take(n); took <= 0 {
		return 0, context.Cause(ctx)
	}
	timer := time.NewTimer(took)
	defer timer.Stop()
	select {
	case <-timer.C:
		return took, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}
