// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/erisfs"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// This file decides between blocks and nars. Blocks are encrypted, so that they do
// not compress: as many bytes as the archive has, where a nar has a third or a
// quarter of them. From near or from several places at once, and when many are
// there already, blocks are the faster way all the same.

// A Speed is how fast bytes come.
type Speed struct {
	Rate    float64       // bytes per second
	Latency time.Duration // of an answer
	Known   bool          // it has been measured
}

// Speeds remembers how fast servers have been.
type Speeds interface {
	// Speed returns what is known of the server at a URL, of which the scheme, the
	// host and the port count.
	Speed(url string) Speed
	// Measured notes that a server has sent so many bytes while they were waited for
	// so long, and that its first byte came after the latency.
	Measured(url string, bytes int64, waited, latency time.Duration)
}

// How fast things go that have not been measured, in bytes of an archive per
// second on one core, and in bytes per second on the line.
const (
	blocksRate  = 400e6
	unknownRate = 10e6
	nearRate    = 1e9
	// unknownRatio is how many times smaller a compressed nar is of which the
	// length is not known.
	unknownRatio = 3.5
)

const (
	unknownLatency = 100 * time.Millisecond
	// Nars have to be faster by so much before they are preferred: what is measured
	// is not exact, and blocks relieve the servers.
	preferFactor = 1.5
	preferMargin = 500 * time.Millisecond
	// presentTime is how long it may take to find out which blocks are there.
	presentTime = 200 * time.Millisecond
)

// decompressRates are by compression.
var decompressRates = map[string]float64{
	"none": 1500e6, "zstd": 600e6, "gzip": 270e6, "lzip": 100e6, "xz": 80e6, "bzip2": 30e6,
}

// A choice is what is expected of both ways.
type choice struct {
	capability    eris.ReadCapability
	hasCapability bool

	blocks      time.Duration
	blocksKnown bool  // the speed of the stores has been measured
	missing     int64 // bytes of blocks that have to be fetched
	nar         time.Duration
	nars        bool // there is a nar at all

	blocksFigures, narFigures string // for people
}

// blocksFirst tells which way is taken first.
func (c *choice) blocksFirst() bool {
	if !c.nars || !c.blocksKnown {
		return true
	}
	return float64(c.blocks) <= preferFactor*float64(c.nar)+float64(preferMargin)
}

// choose compares the ways to the item. Without a capability or a store to use it
// by, the answer does not matter.
func (j *job) choose(ctx context.Context, records []record) *choice {
	c := &choice{}
	if j.s.Blocks == nil {
		return c
	}
	found := j.untried(records)
	if len(found) == 0 {
		return c
	}
	c.capability, c.hasCapability = found[0], true
	size := int64(min(j.want.NarSize, 1<<62))
	c.missing = size
	if j.s.Nearby != nil {
		within, cancel := context.WithTimeout(ctx, presentTime)
		present := image.Present(within, j.s.Nearby, c.capability, erisfs.Limits{NarSize: j.options().MaxBytes}, j.s.NearbyStride)
		cancel()
		c.missing = max(0, size-present)
	}
	speed := Speed{}
	if j.s.StoreSpeed != nil {
		speed = j.s.StoreSpeed()
	}
	c.blocksKnown = speed.Known || c.missing == 0
	if !speed.Known {
		speed = Speed{Rate: unknownRate, Latency: unknownLatency}
	}
	// One round trip after the other: the index, level by level, and a first block.
	depth := time.Duration(c.capability.Level + 2)
	if c.missing > 0 {
		c.blocks = depth*speed.Latency + seconds(float64(c.missing)/speed.Rate)
	}
	c.blocks += seconds(float64(size) / blocksRate)
	c.blocksFigures = fmt.Sprintf("%s of %s missing, %s", megabytes(c.missing), megabytes(size), speed)
	c.chooseNar(j, records, size)
	return c
}

// chooseNar fills in what is expected of the first nar.
func (c *choice) chooseNar(j *job, records []record, size int64) {
	for _, r := range records {
		for _, u := range r.narinfo.PreferredURLs(j.s.order) {
			address, err := narinfo.ResolveURL(r.server.url, u.URL)
			if err != nil {
				continue
			}
			length := float64(u.FileSize)
			if !u.SizeKnown {
				length = float64(size)
				if u.Compression != "none" {
					length /= unknownRatio
				}
			}
			speed := j.s.serverSpeed(address)
			c.nars = true
			c.nar = 2*speed.Latency + seconds(length/speed.Rate+float64(size)/decompressRates[u.Compression])
			c.narFigures = fmt.Sprintf("%s, compression %s, %s", megabytes(int64(length)), u.Compression, speed)
			return
		}
	}
}

// serverSpeed is how fast a server is, or is thought to be.
func (s *Substituter) serverSpeed(address string) Speed {
	u, err := url.Parse(address)
	if err == nil && u.Scheme == "file" {
		return Speed{Rate: nearRate, Known: true}
	}
	if s.Speeds != nil {
		if speed := s.Speeds.Speed(address); speed.Known {
			return speed
		}
	}
	return Speed{Rate: unknownRate, Latency: unknownLatency}
}

// String tells a speed to people.
func (s Speed) String() string {
	how := "measured"
	if !s.Known {
		how = "not measured"
	}
	return fmt.Sprintf("%.1f MB/s after %d ms (%s)", s.Rate/1e6, s.Latency.Milliseconds(), how)
}

// show tells the figures to people who want to know.
func (c *choice) show(j *job) {
	if !j.s.Verbose || !c.hasCapability {
		return
	}
	order := "nar first"
	if c.blocksFirst() {
		order = "blocks first"
	}
	nar := "none"
	if c.nars {
		nar = fmt.Sprintf("%.1f s (%s)", c.nar.Seconds(), c.narFigures)
	}
	j.s.Log.Notef("%s: expected by blocks %.1f s (%s), by nar %s: %s", j.path, c.blocks.Seconds(), c.blocksFigures, nar, order)
}

func seconds(s float64) time.Duration { return time.Duration(min(s, 1e8) * float64(time.Second)) }

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// errSlower is why blocks are given up for a nar.
var errSlower = errors.New("blocks come more slowly than the nar would")

const (
	// paceAfter is for how long blocks may come at any pace.
	paceAfter = 2 * time.Second
	paceEvery = 250 * time.Millisecond
)

// watchPace gives up blocks when they come so slowly that the nar would be there
// much earlier, although it has to be fetched from its start. The caller must call
// what it returns.
func (c *choice) watchPace(fetched func() int64, cancel context.CancelCauseFunc) (stop func()) {
	if !c.nars {
		return func() {}
	}
	begin := time.Now()
	return every(paceEvery, func() bool {
		elapsed := time.Since(begin)
		if elapsed < paceAfter {
			return true
		}
		left := float64(max(0, c.missing-fetched()))
		pace := float64(fetched()) / elapsed.Seconds()
		if left <= preferFactor*pace*(c.nar+preferMargin).Seconds() {
			return true
		}
		cancel(errSlower)
		return false
	})
}

// noteServer remembers how fast a server was.
func (s *Substituter) noteServer(address string, c *counter, latency time.Duration) {
	if s.Speeds == nil || strings.HasPrefix(address, "file:") {
		return
	}
	s.Speeds.Measured(address, c.n.Load(), time.Duration(c.waited.Load()), latency)
}
