// SPDX-License-Identifier: GPL-3.0-or-later

package pool

// queue is where blocks wait for a member, in the order in which they came. They may be taken from
// anywhere in it.
type queue struct {
	lookups []*lookup // nil where one was taken
	start   uint64    // position of lookups[0]
	live    int
	bytes   int64
}

func (q *queue) push(l *lookup) {
	l.queue, l.position = q, q.start+uint64(len(q.lookups))
	q.lookups = append(q.lookups, l)
	q.live++
	q.bytes += int64(l.key.size)
}

func (q *queue) remove(l *lookup) {
	q.lookups[l.position-q.start] = nil
	l.queue = nil
	q.live--
	q.bytes -= int64(l.key.size)
	n := 0
	for n < len(q.lookups) && q.lookups[n] == nil {
		n++
	}
	q.start += uint64(n)
	if q.live == 0 {
		q.lookups = q.lookups[:0] // and its memory is used again
		return
	}
	q.lookups = q.lookups[n:]
}

func (q *queue) first() *lookup {
	if q.live == 0 {
		return nil
	}
	return q.lookups[0]
}
