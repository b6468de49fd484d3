// SPDX-License-Identifier: GPL-3.0-or-later

package blockstore

import "sync"

// Stats is what a [Store] holds, and what it has done since it was opened.
type Stats struct {
	// What is there, as of the last commit.
	Blocks1KiB, Blocks32KiB int64 // blocks of each size
	Bytes                   int64 // of these blocks
	MaxBytes                int64 // Options.MaxBytes

	// What was read.
	Hits   int64 // blocks that were found
	Misses int64 // blocks that were not

	// What was put.
	Puts       int64 // blocks that were acknowledged, duplicates among them
	Duplicates int64 // blocks that were there already
	Failed     int64 // blocks that could not be stored
	Queued     int   // requests that wait for a transaction, at the moment

	Evicted int64 // blocks that made room for others
	Damaged int64 // blocks that were damaged on disk and removed

	// Err is the last failure of something that nobody waited for, if there was any: saving the
	// times of access, giving space back to the file system, or evicting what was above the limit
	// at first. No block is affected.
	Err error
}

// Stats returns the statistics. It is cheap, and does not wait for a commit.
func (s *Store) Stats() Stats {
	var stats Stats
	s.progress.note(func(noted *Stats) { stats = *noted })
	stats.MaxBytes = s.options.MaxBytes
	stats.Queued = len(s.queue)
	stats.Hits, stats.Misses = s.hits.Load(), s.misses.Load()
	return stats
}

// A read that waits for the disk needs a thread, of which a Go program may have 10,000 before it is
// ended: so many requests may well come at a time, so reads must be bounded.
const maxReads = 512

// progress is what the writer tells about itself.
type progress struct {
	mu    sync.Mutex
	stats Stats
}

// note changes the statistics.
func (p *progress) note(change func(*Stats)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.stats)
}

// background notes a failure that nobody waited for.
func (p *progress) background(err error) {
	if err != nil {
		p.note(func(s *Stats) { s.Err = err })
	}
}

// hold notes what is there.
func (s *Stats) hold(state state) {
	s.Blocks1KiB, s.Blocks32KiB = state.blocks[class1KiB], state.blocks[class32KiB]
	s.Bytes = state.bytes()
}
