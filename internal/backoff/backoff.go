// SPDX-License-Identifier: GPL-3.0-or-later

// Package backoff says how long something that failed rests before it is tried again, and how much
// is asked for at a time of what is busy.
package backoff

import (
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A Backoff is the rest of one source, server or connection. Each failure in a row makes it about
// twice as long as the one before, between Min and Max, which the owner sets and must be positive.
// A third of it is chance, so that many clients that failed at the same time do not return at the
// same time. Its zero state is that nothing has failed. It is not safe for concurrent use: whoever
// owns it locks.
type Backoff struct {
	Min, Max time.Duration

	failures int
	until    time.Time
}

// Fail takes note of a failure, and returns how long the rest is from now. The rest is at least
// retryAfter, as the other side has asked for it (0: it has not), but never longer than Max.
// Failures while it rests are of what was under way at the same time, and count as one with the
// first; they can only make the rest longer by their retryAfter.
func (b *Backoff) Fail(now time.Time, retryAfter time.Duration) time.Duration {
	rest := b.Rest(now)
	if rest == 0 {
		rest = min(b.Min, b.Max)
		for range b.failures {
			if rest >= b.Max/2 {
				rest = b.Max
				break
			}
			rest *= 2
		}
		b.failures++
		rest -= rand.N(rest/3 + 1)
	}
	if retryAfter > rest {
		rest = min(b.Max, retryAfter+rand.N(b.Min/3+1))
	}
	b.until = now.Add(rest)
	return rest
}

// Succeed ends the rest, and the row of failures.
func (b *Backoff) Succeed() { b.failures, b.until = 0, time.Time{} }

// Resume goes on with a rest that another process has begun, after so many failures; those before
// one that ended longer ago than the longest rest do not count, nor does what is beyond that.
func (b *Backoff) Resume(until time.Time, failures int) {
	now := time.Now()
	if rest := until.Sub(now); rest > -b.Max {
		b.failures, b.until = failures, now.Add(min(rest, b.Max))
	}
}

// Rest returns how long the rest still is; 0 if it is over.
func (b *Backoff) Rest(now time.Time) time.Duration { return max(0, b.until.Sub(now)) }

// Failures returns the number of failures in a row, those counted that began a rest.
func (b *Backoff) Failures() int { return b.failures }

// A Limit is how many requests may be under way with a source that refuses what is too much for it:
// as many as it was answering then, and a quarter more each second, or after four times as long as
// it has wanted to be left alone. Its zero state is that there is no limit. It is not safe for
// concurrent use.
type Limit struct {
	most  int // 0: any number
	grows time.Time
}

// Refuse takes note that a request was refused beside so many others, which were answered meanwhile
// or may still be, and of what the source has asked for (see [Backoff.Fail]). A source that refuses
// one alone does not do so because of their number, and has no limit.
func (l *Limit) Refuse(now time.Time, others int, retryAfter time.Duration) {
	if l.most == 0 || others < l.most {
		l.most = others
	}
	l.grows = now.Add(max(time.Second, 4*retryAfter))
}

// Allows reports whether there may be one more request beside those that are under way.
func (l *Limit) Allows(now time.Time, requests int) bool {
	if requests >= l.most && l.most > 0 && now.After(l.grows) {
		l.most += (l.most + 3) / 4
		l.grows = now.Add(time.Second)
	}
	return l.most == 0 || requests < l.most
}

// mostRetryAfter bounds what servers ask for; callers have much lower bounds.
const mostRetryAfter = 24 * time.Hour

// RetryAfter reads the value of the header field Retry-After (RFC 9110, section 10.2.3), a number
// of seconds or a date. It returns 0 if there is none, it cannot be read, or it is past; and at
// most a day.
func RetryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	if n, err := strconv.ParseUint(value, 10, 64); err == nil {
		return time.Duration(min(n, uint64(mostRetryAfter/time.Second))) * time.Second
	}
	t, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(0, t.Sub(now)), mostRetryAfter)
}
