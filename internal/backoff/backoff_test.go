// SPDX-License-Identifier: GPL-3.0-or-later

package backoff_test

import (
	"testing"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
)

func TestBackoff(t *testing.T) {
	now := time.Unix(1000, 0)
	b := backoff.Backoff{Min: time.Second, Max: 30 * time.Second}
	if b.Rest(now) != 0 {
		t.Error("it rests before anything has failed")
	}
	for i, most := range []time.Duration{1, 2, 4, 8, 16, 30, 30, 30} {
		most *= time.Second
		rest := b.Fail(now, 0)
		if rest > most || rest < most*2/3 || b.Rest(now) != rest || b.Failures() != i+1 {
			t.Errorf("failure %d: rests %v of %v, %d failures", i, rest, most, b.Failures())
		}
		if again := b.Fail(now.Add(rest/2), 0); again != rest-rest/2 || b.Failures() != i+1 {
			t.Errorf("a failure at the same time makes %v of %v", again, rest)
		}
		now = now.Add(rest)
		if b.Rest(now) != 0 {
			t.Errorf("it rests for %v after its rest", b.Rest(now))
		}
	}
	b.Fail(now, 0)
	b.Succeed()
	if rest := b.Rest(now); rest != 0 || b.Failures() != 0 {
		t.Errorf("it rests for %v after a success", rest)
	}
	if rest := b.Fail(now, 0); rest > time.Second {
		t.Errorf("it rests for %v after the first failure in a row", rest)
	}
}

// What another process has noted may be of a clock that was ahead.
func TestResume(t *testing.T) {
	for until, want := range map[time.Duration]time.Duration{
		-2 * time.Minute: 0, -time.Second: 0, 10 * time.Second: 10 * time.Second, 59 * time.Minute: time.Minute,
	} {
		b := backoff.Backoff{Min: time.Second, Max: time.Minute}
		now := time.Now()
		b.Resume(now.Add(until), 3)
		if rest := b.Rest(now); rest < want || rest > want+time.Since(now) {
			t.Errorf("until %v from now: rests %v", until, rest)
		}
	}
}

// Chance spreads those that failed at once.
func TestJitter(t *testing.T) {
	rests := map[time.Duration]bool{}
	for range 50 {
		b := backoff.Backoff{Min: time.Second, Max: time.Minute}
		rests[b.Fail(time.Unix(0, 0), 0)] = true
		b.Succeed()
		rests[b.Fail(time.Unix(0, 0), 10*time.Second)] = true
	}
	if len(rests) < 50 {
		t.Errorf("%d different rests of 100", len(rests))
	}
}

func TestFailRetryAfter(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, test := range []struct{ after, least, most time.Duration }{
		{0, 0, time.Second},
		{10 * time.Second, 10 * time.Second, 11 * time.Second},
		{time.Hour, 30 * time.Second, 30 * time.Second},
	} {
		b := backoff.Backoff{Min: time.Second, Max: 30 * time.Second}
		if rest := b.Fail(now, test.after); rest < test.least || rest > test.most {
			t.Errorf("asked for %v: rests %v", test.after, rest)
		}
		b = backoff.Backoff{Min: time.Second, Max: 30 * time.Second}
		b.Fail(now, 0)
		if rest := b.Fail(now, test.after); rest < test.least || rest > test.most {
			t.Errorf("asked for %v while it rests: rests %v", test.after, rest)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 27, 17, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                               0,
		"0":                              0,
		"1":                              time.Second,
		" 120 ":                          2 * time.Minute,
		"86401":                          24 * time.Hour,
		"18446744073709551615":           24 * time.Hour,
		"18446744073709551616":           0,
		"-1":                             0,
		"1.5":                            0,
		"soon":                           0,
		"Fri, 27 Nov 2026 17:00:30 GMT":  30 * time.Second,
		"Fri, 27 Nov 2026 16:59:30 GMT":  0,
		"Sun, 27 Nov 2050 17:00:00 GMT":  24 * time.Hour,
		"Friday, 27-Nov-26 17:00:01 GMT": time.Second,
	} {
		if got := backoff.RetryAfter(value, now); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
}
