// SPDX-License-Identifier: GPL-3.0-or-later

// Package memory keeps answers for the next request of this process, and knows what is being
// requested, so that nothing is requested twice at the same time.
package memory

import (
	"sync"
	"time"
)

const (
	// maxAnswers is how many answers are kept, and maxBytes how many bytes they may take.
	maxAnswers = 20000
	maxBytes   = 12 << 20
)

// A Memory has answers by what they are answers to. The zero value is ready. It is safe for
// concurrent use.
type Memory[K comparable, V any] struct {
	mu      sync.Mutex
	open    map[K]*Request[V]
	answers map[K]kept[V]
	bytes   int // of answers put since the map was made
}

type kept[V any] struct {
	answer V
	until  time.Time
}

// A Request is one that is under way.
type Request[V any] struct {
	// Done is closed when there is an answer, or will be none.
	Done chan struct{}
	// Answered says if there is one, and Answer what it is; they are set before Done is closed.
	Answered bool
	Answer   V
}

// Begin returns what is kept of an answer, unless it is to be anew, or else the request that is
// under way, and whether that is the caller's, who must end it by End.
func (m *Memory[K, V]) Begin(key K, anew bool, now time.Time) (answer V, known bool, r *Request[V], ours bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	// Times of the process go on when the clock is set.
	if e, ok := m.answers[key]; ok && !anew && !now.After(e.until) {
		return e.answer, true, nil, false
	}
	if r := m.open[key]; r != nil {
		return answer, false, r, false
	}
	if m.open == nil {
		m.open = map[K]*Request[V]{}
	}
	r = &Request[V]{Done: make(chan struct{})}
	m.open[key] = r
	return answer, false, r, true
}

// End ends a request, with an answer or without, unless that has been done.
func (m *Memory[K, V]) End(key K, r *Request[V], answered bool, answer V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open[key] == r {
		delete(m.open, key)
		r.Answered, r.Answer = answered, answer
		close(r.Done)
	}
}

// Put keeps an answer, which takes about so many bytes, until some time.
func (m *Memory[K, V]) Put(key K, answer V, bytes int, until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.answers == nil || len(m.answers) >= maxAnswers || m.bytes > maxBytes {
		m.answers, m.bytes = map[K]kept[V]{}, 0
	}
	m.bytes += bytes
	m.answers[key] = kept[V]{answer, until}
}

// Clear forgets all answers.
func (m *Memory[K, V]) Clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.answers, m.bytes = nil, 0
}
