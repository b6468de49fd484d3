// SPDX-License-Identifier: GPL-3.0-or-later

// Package sourcestate remembers how fast, how far and how honest sources were, for the next process: the daemon starts new
// helpers all the time, and each of them would have to find out again. Start with [Open].
//
// What is remembered are hints, never reasons to trust: a file that is lost, cut off or wrong costs some speed. Any number of
// processes may use one file; each adds what it has learnt. URLs, which may hold secrets, are kept as hashes only.
package sourcestate

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Record is what is known about a source. Its zero value, but for Score, says that nothing is known.
type Record struct {
	// Rate is the speed in bytes per second; 0 if it is not known.
	Rate float64
	// RoundTrip is the shortest time that an answer took; 0 if it is not known.
	RoundTrip time.Duration
	// Score is 1 for a source that never gave wrong bytes, less after it did, and rises again with time. It is above 0.
	Score float64
	// Fault is when it last gave wrong bytes, and Failure when it last could not be reached and has not been since.
	Fault, Failure time.Time
	// Updated is when anything was last learnt.
	Updated time.Time
}

const (
	// maxAge is after how long a record is forgotten, and maxSpeedAge after how long its speed is.
	maxAge      = 90 * 24 * time.Hour
	maxSpeedAge = 14 * 24 * time.Hour
	// faultHalfLife is after how long a fault weighs half.
	faultHalfLife = 2 * 24 * time.Hour
	// faultFactor is what a fault leaves of the score.
	faultFactor  = 0.25
	leastScore   = 1.0 / 1024
	maxRecords   = 512
	maxFile      = 256 << 10
	lockPatience = 2 * time.Second
	// slowestMeasured is how many bytes a measurement needs to say anything about speed, and wholeMeasured to be believed as
	// much as all earlier ones together.
	slowestMeasured = 32 << 10
	wholeMeasured   = 4 << 20
)

// State is the knowledge of this process, from the file and of its own. It is safe for concurrent use.
type State struct {
	path string
	now  func() time.Time

	mu      sync.Mutex
	records map[string]Record // by key
	touched map[string]bool   // since the last Save
}

// Open reads the file at path. If there is none, or it makes no sense, nothing is known. An empty path stands for a State that
// is not kept.
func Open(path string) *State { return open(path, time.Now) }

func open(path string, now func() time.Time) *State {
	s := &State{path: path, now: now, records: map[string]Record{}, touched: map[string]bool{}}
	if path != "" {
		s.records = read(path, now())
	}
	return s
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
	return s.get(key(url))
}

func (s *State) get(key string) Record {
	r, ok := s.records[key]
	if !ok {
		return Record{Score: 1}
	}
	return r.aged(s.now())
}

// aged returns what the record says now.
func (r Record) aged(now time.Time) Record {
	if age := now.Sub(r.Fault); r.Fault.IsZero() || age < 0 {
		r.Score = max(leastScore, min(r.Score, 1))
	} else {
		// The stored score is that at the time of the fault.
		r.Score = max(leastScore, 1-(1-r.Score)*math.Exp2(-age.Hours()/faultHalfLife.Hours()))
	}
	if now.Sub(r.Updated) > maxSpeedAge {
		r.Rate, r.RoundTrip = 0, 0
	}
	return r
}

// Measured notes that the source delivered so many bytes in so much time, and the shortest time an answer took. Either of
// them may be 0 if it was not measured. It also says that the source can be reached.
func (s *State) Measured(url string, bytes int64, duration, roundTrip time.Duration) {
	s.change(url, func(r *Record, now time.Time) {
		if bytes >= slowestMeasured && duration > 0 {
			rate := float64(bytes) / duration.Seconds()
			if r.Rate > 0 {
				weight := min(0.5, 0.5*float64(bytes)/wholeMeasured)
				rate = r.Rate*(1-weight) + rate*weight
			}
			r.Rate = rate
		}
		if roundTrip > 0 {
			if r.RoundTrip > 0 && roundTrip > r.RoundTrip {
				roundTrip = (r.RoundTrip + roundTrip) / 2
			}
			r.RoundTrip = roundTrip
		}
		r.Failure = time.Time{}
	})
}

// Fault notes that the source gave wrong bytes.
func (s *State) Fault(url string) {
	s.change(url, func(r *Record, now time.Time) {
		r.Score = max(leastScore, r.Score*faultFactor)
		r.Fault = now
	})
}

// Failed notes that the source could not be reached.
func (s *State) Failed(url string) {
	s.change(url, func(r *Record, now time.Time) { r.Failure = now })
}

func (s *State) change(url string, f func(r *Record, now time.Time)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, now := key(url), s.now().Truncate(time.Millisecond)
	stored := s.records[k]
	r := s.get(k)
	fault := r.Fault
	f(&r, now)
	if r.Fault.Equal(fault) {
		r.Score = stored.Score // as of the time of the fault
		if fault.IsZero() {
			r.Score = 1
		}
	}
	r.Updated = now
	s.records[k], s.touched[k] = r, true
	if len(s.records) > 2*maxRecords {
		s.records = newest(s.records)
	}
}

// Save adds what this process has learnt since the last Save to the file, which appears complete or not at all. It waits at
// most some seconds for other processes that do the same. Without a path it does nothing. Errors are of the file system; the
// next Save writes what this one could not.
func (s *State) Save() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.path == "" || len(s.touched) == 0 {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		return err
	}
	lock, err := lockFile(s.path + ".lock")
	if err != nil {
		return err
	}
	defer lock.Close()
	records := read(s.path, s.now())
	for k := range s.touched {
		if mine, ok := s.records[k]; ok {
			records[k] = merge(records[k], mine)
		}
	}
	records = newest(records)
	if err := write(s.path, records); err != nil {
		return err
	}
	s.records = records
	clear(s.touched)
	return nil
}

// merge adds what this process knows to what the file says, which may be of another process and newer.
func merge(theirs, mine Record) Record {
	if theirs.Updated.IsZero() {
		return mine
	}
	merged := mine
	if theirs.Updated.After(mine.Updated) {
		merged = theirs
	}
	if merged.Rate == 0 {
		merged.Rate = max(mine.Rate, theirs.Rate)
	}
	if merged.RoundTrip == 0 {
		merged.RoundTrip = max(mine.RoundTrip, theirs.RoundTrip)
	}
	if theirs.Fault.After(mine.Fault) {
		merged.Fault, merged.Score = theirs.Fault, theirs.Score
	} else {
		merged.Fault, merged.Score = mine.Fault, mine.Score
		if theirs.Fault.Equal(mine.Fault) {
			merged.Score = min(mine.Score, theirs.Score)
		}
	}
	return merged
}

// file is the form on disk.
type file struct {
	Version int                 `json:"version"`
	Sources map[string]fileData `json:"sources"`
}

type fileData struct {
	Rate      float64 `json:"rate,omitempty"`       // bytes per second
	RoundTrip int64   `json:"round_trip,omitempty"` // microseconds
	Score     float64 `json:"score"`
	Fault     int64   `json:"fault,omitempty"` // milliseconds since 1970, like those below
	Failure   int64   `json:"failure,omitempty"`
	Updated   int64   `json:"updated"`
}

const version = 1

// read returns the records of a file, as far as they make sense.
func read(path string, now time.Time) map[string]Record {
	records := map[string]Record{}
	f, err := os.Open(path)
	if err != nil {
		return records
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil || len(b) > maxFile {
		return records
	}
	return parse(b, now)
}

func parse(b []byte, now time.Time) map[string]Record {
	records := map[string]Record{}
	var data file
	decoder := json.NewDecoder(bytes.NewReader(b))
	if decoder.Decode(&data) != nil || data.Version != version || len(data.Sources) > maxRecords {
		return records
	}
	for k, d := range data.Sources {
		r := Record{
			Rate: d.Rate, RoundTrip: time.Duration(d.RoundTrip) * time.Microsecond, Score: d.Score,
			Fault: fromMillis(d.Fault), Failure: fromMillis(d.Failure), Updated: fromMillis(d.Updated),
		}
		soon := now.Add(time.Minute) // clocks are set now and then
		if len(k) != 32 || r.Updated.After(soon) || now.Sub(r.Updated) > maxAge || r.Fault.After(soon) || r.Failure.After(soon) ||
			!(r.Rate >= 0 && r.Rate < 1e12) || d.RoundTrip < 0 || d.RoundTrip > time.Minute.Microseconds() || !(r.Score > 0 && r.Score <= 1) {
			continue
		}
		records[k] = r
	}
	return records
}

func fromMillis(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.UnixMilli(n)
}

func toMillis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// newest returns the records that were updated last, as many as are kept.
func newest(records map[string]Record) map[string]Record {
	if len(records) <= maxRecords {
		return records
	}
	keys := make([]string, 0, len(records))
	for k := range records {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b string) int { return records[b].Updated.Compare(records[a].Updated) })
	kept := make(map[string]Record, maxRecords)
	for _, k := range keys[:maxRecords] {
		kept[k] = records[k]
	}
	return kept
}

// write replaces the file. It is not synced: after a power failure it may be empty, which does no harm.
func write(path string, records map[string]Record) error {
	data := file{Version: version, Sources: make(map[string]fileData, len(records))}
	for k, r := range records {
		data.Sources[k] = fileData{
			Rate: math.Round(r.Rate), RoundTrip: r.RoundTrip.Microseconds(), Score: r.Score,
			Fault: toMillis(r.Fault), Failure: toMillis(r.Failure), Updated: toMillis(r.Updated),
		}
	}
	b, err := json.Marshal(data)
	if err != nil {
		return err
	}
	temporary := path + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		os.Remove(temporary)
	}
	return err
}

// lockFile takes the lock that writers have; closing the file gives it back.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if (err != unix.EWOULDBLOCK && err != unix.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
	}
}
