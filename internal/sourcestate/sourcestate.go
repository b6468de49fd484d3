// SPDX-License-Identifier: GPL-3.0-or-later

// Package sourcestate remembers how fast and how far sources were, for the next process: the daemon
// starts new helpers all the time, and each of them would have to find out again. Start with
// [Open].
//
// What is remembered are hints, never reasons to trust: a file that is lost, cut off or wrong costs
// some speed. Any number of processes may use one file; each adds what it has learnt. URLs, which
// may hold secrets, are kept as hashes only.
package sourcestate

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// Record is what is known about a source; its zero value is nothing. It has the form of the file.
type Record struct {
	// Rate is the speed in bytes per second; 0 if it is not known.
	Rate float64 `json:"rate,omitzero"`
	// RoundTrip is the shortest time that an answer took; 0 if it is not known.
	RoundTrip time.Duration `json:"round_trip,omitzero"`
	// Rest is until when it is to be left alone because it did not answer, Rests times in a row; 0
	// if it answers.
	Rest  time.Time `json:"rest,omitzero"`
	Rests int       `json:"rests,omitzero"`
	// Measured is when the rate was last measured, and Updated when anything was last learnt.
	Measured time.Time `json:"measured,omitzero"`
	Updated  time.Time `json:"updated"`
}

// Ahead counts what helpers have substituted ahead of the daemon, and what of that it has asked
// for: items, and the bytes of their NarSize. What is left of them in the end was in vain.
type Ahead struct {
	Staged      int64 `json:"staged"`
	StagedBytes int64 `json:"staged_bytes"`
	Used        int64 `json:"used"`
	UsedBytes   int64 `json:"used_bytes"`
	// Since is when counting began; zero if nothing was counted.
	Since time.Time `json:"since,omitzero"`
}

const (
	// maxAge is after how long a record is forgotten, and maxSpeedAge after how long its speed is:
	// another network or another hour may have another one.
	maxAge      = 90 * 24 * time.Hour
	maxSpeedAge = 12 * time.Hour
	// rateHalfLife is after how long a rate weighs half of what it did against a new one.
	rateHalfLife = 10 * time.Minute
	maxRecords   = 512
	maxRests     = 1000
	maxFile      = 256 << 10
	maxChanges   = 8192
	lockWait     = 2 * time.Second
	// slowestMeasured is how many bytes a measurement needs to say anything about speed, and
	// wholeMeasured to be believed as much as all earlier ones together.
	slowestMeasured = 32 << 10
	wholeMeasured   = 4 << 20
)

// State is the knowledge of this process, from the file and of its own. It is safe for concurrent
// use.
type State struct {
	path string

	mu      sync.Mutex
	known   file
	changes []func(*file) // since the last Save
}

// Open reads the file at path. If there is none, or it makes no sense, nothing is known. An empty
// path stands for a State that is not kept.
func Open(path string) *State {
	if path == "" {
		return &State{known: parse(nil)}
	}
	return &State{path: path, known: read(path)}
}

// key hides the URL.
func key(url string) string {
	sum := sha256.Sum256([]byte("guix-substitute-eris source " + url))
	return hex.EncodeToString(sum[:16])
}

// Get returns what is known about the source at the given URL, as far as it is of use today.
func (s *State) Get(url string) Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known.Sources[key(url)].aged(time.Now())
}

// aged returns what the record says now.
func (r Record) aged(now time.Time) Record {
	if now.Sub(r.Updated) > maxSpeedAge {
		r.Rate, r.RoundTrip = 0, 0
	} else if now.Sub(r.Measured) > maxSpeedAge {
		r.Rate = 0
	}
	return r
}

// Measured notes that the source delivered so many bytes in so much time, and the shortest time an
// answer took. Either of them may be 0 if it was not measured. It also says that the source can be
// reached.
func (s *State) Measured(url string, bytes int64, duration, roundTrip time.Duration) {
	s.learn(url, func(r *Record, now time.Time) {
		if bytes >= slowestMeasured && duration > 0 {
			rate := float64(bytes) / duration.Seconds()
			if r.Rate > 0 {
				// What is old counts less.
				age := min(1, math.Exp2(-now.Sub(r.Measured).Hours()/rateHalfLife.Hours()))
				weight := 1 - age*(1-min(0.5, 0.5*float64(bytes)/wholeMeasured))
				rate = r.Rate*(1-weight) + rate*weight
			}
			r.Rate, r.Measured = rate, now
		}
		switch {
		case r.RoundTrip > 0 && roundTrip > r.RoundTrip:
			r.RoundTrip = (r.RoundTrip + roundTrip) / 2
		case roundTrip > 0:
			r.RoundTrip = roundTrip
		}
		r.Rest, r.Rests = time.Time{}, 0
	})
}

// Rests notes that the source did not answer, so many times in a row, and is to be left alone until
// then.
func (s *State) Rests(url string, until time.Time, times int) {
	s.learn(url, func(r *Record, now time.Time) {
		r.Rest, r.Rests = until.Round(time.Millisecond).UTC(), min(times, maxRests)
	})
}

// CountAhead adds to what has been counted, unless that is nothing. Since does not matter.
func (s *State) CountAhead(a Ahead) {
	if a == (Ahead{Since: a.Since}) {
		return
	}
	now := time.Now().Truncate(time.Second).UTC()
	s.change(func(f *file) {
		f.Ahead.Staged, f.Ahead.StagedBytes = f.Ahead.Staged+a.Staged, f.Ahead.StagedBytes+a.StagedBytes
		f.Ahead.Used, f.Ahead.UsedBytes = f.Ahead.Used+a.Used, f.Ahead.UsedBytes+a.UsedBytes
		if f.Ahead.Since.IsZero() {
			f.Ahead.Since = now
		}
	})
}

// ReadAhead returns what a file has counted, also one of another user.
func ReadAhead(path string) Ahead {
	b, _ := files.ReadRegular(path, maxFile) // which says nothing if it cannot be read
	return parse(b).Ahead
}

func (s *State) learn(url string, learn func(r *Record, now time.Time)) {
	k, now := key(url), time.Now().Round(time.Millisecond).UTC()
	s.change(func(f *file) {
		r := f.Sources[k].aged(now)
		learn(&r, now)
		if now.After(r.Updated) {
			r.Updated = now
		}
		f.Sources[k] = r
		if len(f.Sources) > 2*maxRecords {
			keepNewest(f.Sources)
		}
	})
}

// change changes what is known, and what Save writes.
func (s *State) change(change func(*file)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.known)
	if s.path != "" {
		s.changes = append(s.changes, change)
	}
	if len(s.changes) > maxChanges { // of a file that cannot be written
		s.changes = slices.Delete(s.changes, 0, maxChanges/2)
	}
}

// Save adds what this process has learnt since the last Save to the file, which appears complete or
// not at all. It waits at most some seconds for other processes that do the same. Without a path it
// does nothing. Errors are of the file system; the next Save writes what this one could not.
func (s *State) Save() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.changes) == 0 {
		return nil
	}
	if err := files.MakeDirectory(filepath.Dir(s.path)); err != nil {
		return err
	}
	lock, err := files.Lock(s.path+".lock", lockWait)
	if err != nil {
		return err
	}
	defer lock.Close()
	data := read(s.path)
	for _, change := range s.changes {
		change(&data)
	}
	keepNewest(data.Sources)
	b, err := json.Marshal(data)
	if err == nil {
		// It is not synced: after a power failure it may be empty, which does no harm.
		err = files.Write(s.path, 0o600, files.Options{Locked: true}, b)
	}
	if err == nil {
		s.known, s.changes = data, nil
	}
	return err
}

// file is the form on disk.
type file struct {
	Version int               `json:"version"`
	Sources map[string]Record `json:"sources"`
	Ahead   Ahead             `json:"ahead,omitzero"`
}

const version = 2

// read returns what a file says that this user has written; what cannot be read says nothing.
func read(path string) file {
	b, _ := files.ReadState(path, maxFile)
	return parse(b)
}

// parse returns what a file says, as far as it makes sense.
func parse(b []byte) file {
	var data file
	if json.Unmarshal(b, &data) != nil || data.Version != version || len(data.Sources) > maxRecords {
		return file{Version: version, Sources: map[string]Record{}}
	}
	now := time.Now()
	soon := now.Add(time.Minute) // clocks are set now and then
	sources := map[string]Record{}
	for k, r := range data.Sources {
		if len(k) == 32 && r.valid(now, soon) {
			sources[k] = r
		}
	}
	data.Sources = sources
	if a := data.Ahead; min(a.Staged, a.StagedBytes, a.Used, a.UsedBytes) < 0 ||
		max(a.Staged, a.StagedBytes, a.Used, a.UsedBytes) > 1<<60 || a.Since.After(soon) {
		data.Ahead = Ahead{}
	}
	return data
}

// valid reports whether a record makes sense.
func (r *Record) valid(now, soon time.Time) bool {
	return !r.Updated.After(soon) && now.Sub(r.Updated) <= maxAge && !r.Measured.After(soon) &&
		!r.Rest.After(now.Add(time.Hour)) && r.Rests >= 0 && r.Rests <= maxRests && r.Rate >= 0 && r.Rate < 1e12 &&
		r.RoundTrip >= 0 && r.RoundTrip <= time.Minute
}

// keepNewest removes the records that were not updated last, where there are too many.
func keepNewest(records map[string]Record) {
	if len(records) <= maxRecords {
		return
	}
	keys := slices.SortedFunc(maps.Keys(records), func(a, b string) int { return records[b].Updated.Compare(records[a].Updated) })
	for _, k := range keys[maxRecords:] {
		delete(records, k)
	}
}
