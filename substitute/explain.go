// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

// An Availability says whether an item can be had, and if not, the one thing that is in the way.
type Availability string

// The availabilities.
const (
	Available     Availability = "available"
	NotAvailable  Availability = "not available"  // no server has it, or no way to it can be used
	NotAuthorised Availability = "not authorised" // servers have it, but no signature counts
	NotReachable  Availability = "not reachable"  // no server has answered
)

// An Explanation is what a [Substituter] knows of an item and what it would do to get it. What
// comes from servers is checked, but may have any characters; it is for the caller to show it
// safely.
type Explanation struct {
	Path         string       `json:"path"`
	Availability Availability `json:"availability"`
	// Reason says in one sentence why that is so, or why the first way is the first.
	Reason  string         `json:"reason"`
	Servers []ServerReport `json:"servers"` // in the order of preference
	// NarHash, NarSize (bytes) and References are those of the authorised narinfo.
	NarHash    string      `json:"narHash,omitempty"`
	NarSize    uint64      `json:"narSize,omitempty"`
	References int         `json:"references"`
	Ways       []WayReport `json:"ways"` // in the order in which they would be tried
	// Notes are warnings, each a sentence.
	Notes []string `json:"notes,omitempty"`
}

// A ServerReport is what one server says about an item.
type ServerReport struct {
	URL     string        `json:"url"`               // without a password
	Latency time.Duration `json:"latencyNs"`         // of the answer, or until it was given up
	Status  int           `json:"status,omitempty"`  // of HTTP; 0 if there was no answer
	Failure string        `json:"failure,omitempty"` // why there was no answer, or why it is of no use
	// Baking says that it has begun to make the nar, and will have a narinfo later.
	Baking bool `json:"baking,omitempty"`
	// Narinfo is what it has answered; nil if nothing, or nothing that is one of the item.
	Narinfo *narinfo.Narinfo `json:"-"`
	// Signer is what the signer calls itself, which anybody can write, and Key its public key, as
	// an s-expression.
	Signer string `json:"signer,omitempty"`
	Key    string `json:"key,omitempty"`
	// Authorised reports whether the narinfo counts by itself, and Refused says why not.
	Authorised bool   `json:"authorised"`
	Refused    string `json:"refused,omitempty"`
	// UnknownKey says that the signature may be good, but that the key is not authorised.
	UnknownKey bool `json:"unknownKey,omitempty"`
	// Vouches says that it is this narinfo that the item must have the hash of.
	Vouches bool `json:"vouches,omitempty"`
	// Differs are the fields in which it differs from that one; none if what it offers can be used.
	Differs      []string           `json:"differs,omitempty"`
	Nars         []NarReport        `json:"nars,omitempty"`
	Capabilities []CapabilityReport `json:"capabilities,omitempty"`
}

// A NarReport is a nar that a narinfo offers.
type NarReport struct {
	URL         string `json:"url"` // as the narinfo has it
	Compression string `json:"compression"`
	Size        int64  `json:"size"`             // in bytes; negative if unknown: it is made while it is sent
	Unused      string `json:"unused,omitempty"` // why it cannot be used
}

// A CapabilityReport is a read capability that a narinfo offers.
type CapabilityReport struct {
	URN       string `json:"urn"`
	Signed    bool   `json:"signed"` // the signature covers it
	BlockSize int    `json:"blockSize,omitempty"`
	Level     int    `json:"level"`
	Unused    string `json:"unused,omitempty"` // why it cannot be used
}

// A WayReport is one way to get the item.
type WayReport struct {
	Kind string `json:"kind"` // "old item", "delta", "blocks" (also with an old item) or "nar"
	// Name is the file name of the old item, the URN, or the URL.
	Name   string        `json:"name"`
	Server string        `json:"server,omitempty"` // whose narinfo offers it
	Bytes  int64         `json:"bytes"`            // to be fetched
	Time   time.Duration `json:"timeNs"`           // that it should take
	Known  bool          `json:"known"`            // the time rests on what was measured
	How    string        `json:"how"`              // the expectation for people
}

// Explain says what it knows of an item and what Substitute would do to get it; it runs the same
// code up to the first byte of the contents. All servers are requested anew, also those that
// Substitute would not need, and what they say is kept for later as usual. The path must be that of
// a store item. It does not look at single blocks, but for those nearby.
func (s *Substituter) Explain(ctx context.Context, path string) (Explanation, error) {
	hash, err := narinfo.HashPart(s.StoreDir, path)
	if err != nil {
		return Explanation{}, err
	}
	e := Explanation{Path: path, Servers: make([]ServerReport, len(s.servers))}
	records := make([]*record, len(s.servers))
	var said strings.Builder
	log := s.Log
	s.Log = protocol.NewLog(&said, protocol.LogStyle{Unicode: true})
	s.sayIgnored()
	var workers sync.WaitGroup
	for i, server := range s.servers {
		workers.Go(func() { e.Servers[i], records[i] = s.inquire(ctx, server, path, hash) })
	}
	workers.Wait()
	s.Log = log
	for line := range strings.Lines(said.String()) {
		_, text, _ := strings.Cut(line, "warning: ")
		e.Notes = append(e.Notes, strings.TrimSpace(text))
	}
	j := &job{s: s, path: path, log: s.Log}
	err = j.prepare(ctx, s.lookup(ctx, []string{path}))
	want := j.want
	for i := range e.Servers {
		s.describe(&e.Servers[i], records[i], want)
	}
	if err != nil {
		e.Availability, e.Reason = s.unavailable(e.Servers, err)
		return e, context.Cause(ctx)
	}
	if len(j.ways) == 0 {
		j.moreRecords(ctx)
	}
	e.NarHash, e.NarSize, e.References = want.NarHash, want.NarSize, len(want.References)
	for _, c := range j.ways {
		e.Ways = append(e.Ways, c.report())
	}
	e.Availability, e.Reason = j.reason()
	return e, context.Cause(ctx)
}

// inquire requests what a server has.
func (s *Substituter) inquire(ctx context.Context, server *server, path, hash string) (ServerReport, *record) {
	r := ServerReport{URL: server.name}
	var result *record
	ctx, cancel := lookupContext(ctx, 1)
	defer cancel()
	begin := time.Now()
	err := s.Mirrors.Narinfos(ctx, server.url, []string{hash}, mirror.Wanted, func(a mirror.Answer) {
		r.Status, r.Baking = a.Status, a.Baking
		if a.Unfollowed != nil {
			r.Failure = "answers with " + a.StatusText()
		}
		result = s.note(server, &item{path: path, hash: hash}, a)
	})
	r.Latency = time.Since(begin)
	if err != nil {
		r.Failure = err.Error()
	}
	return r, result
}

// describe adds what a narinfo says; want is the one that is authorised, if there is one.
func (s *Substituter) describe(report *ServerReport, r *record, want *narinfo.Narinfo) {
	if r == nil {
		return
	}
	n := r.narinfo
	report.Narinfo, report.Authorised = n, r.authorised
	report.Signer, report.Key = acl.Signer(n.Signature)
	if r.refused != nil {
		report.Refused, report.UnknownKey = r.refused.Error(), errors.Is(r.refused, acl.ErrUnauthorisedKey)
	}
	if want != nil {
		report.Vouches, report.Differs = want.Text() == n.Text() && r.authorised, narinfo.Differences(n, want)
	}
	usable := n.PreferredURLs()
	for _, u := range n.URLs {
		nar := NarReport{URL: u.URL, Compression: u.Compression, Size: -1}
		if u.SizeKnown {
			nar.Size = int64(min(u.FileSize, 1<<62))
		}
		if _, err := narURL(*r, u.URL); err != nil {
			nar.Unused = err.Error()
		} else if !slices.Contains(usable, u) {
			nar.Unused = "the URL or the compression is not understood"
		}
		report.Nars = append(report.Nars, nar)
	}
	for _, e := range n.ERIS {
		signed := e.Signed && r.authorised
		c, err := s.capability(e.URN, signed)
		offered := CapabilityReport{URN: e.URN, Signed: signed, BlockSize: int(c.BlockSize), Level: c.Level}
		if err != nil && err != errNoBlocks { // the ways say that
			offered.Unused = err.Error()
		}
		report.Capabilities = append(report.Capabilities, offered)
	}
}

// unavailable says why there is no way at all.
func (s *Substituter) unavailable(servers []ServerReport, err error) (Availability, string) {
	some := func(f func(r ServerReport) bool) bool { return slices.ContainsFunc(servers, f) }
	switch {
	case !errors.Is(err, errNone):
		return NotAvailable, err.Error()
	case len(servers) == 0:
		return NotAvailable, "there is no substitute server to ask"
	case some(func(r ServerReport) bool { return r.UnknownKey }):
		return NotAuthorised, "it is signed by a key that is not authorised"
	case some(func(r ServerReport) bool { return r.Narinfo != nil && !r.Authorised }):
		return NotAuthorised, "no narinfo of it has a signature that counts"
	case some(func(r ServerReport) bool { return r.Baking }):
		return NotAvailable, "a server has begun to make it, and no other has it; try again in some minutes"
	case some(func(r ServerReport) bool { return r.Narinfo == nil && (r.Failure == "" || r.Status != 0) }):
		return NotAvailable, "no server that answers has it"
	}
	return NotReachable, "no server can be reached"
}

// report describes a way.
func (c *candidate) report() WayReport {
	r := WayReport{Kind: c.kind, Name: c.String(), Bytes: c.bytes, Time: c.time, Known: c.known, How: c.how}
	if c.kind == "leaves" {
		r.Kind = "blocks"
	}
	if c.from.server != nil {
		r.Server = c.from.server.name
	}
	return r
}

// reason says why the first way is the first.
func (j *job) reason() (Availability, string) {
	if len(j.ways) == 0 {
		return NotAvailable, "no way to it can be used: " + j.notBlocks() + ", and no nar"
	}
	first := j.ways[0]
	switch first.kind {
	case "old item":
		return Available, "it is made of an older item, with nothing fetched, unless the result has another hash"
	case "leaves":
		return Available, "it is made of an older item, which cannot become it as a whole, and of blocks"
	case "delta", "nar":
		return Available, "it comes as a " + first.kind + ", and not from blocks: " + j.notBlocks()
	}
	nar := slices.IndexFunc(j.ways, func(c *candidate) bool { return !isBlocks(c) })
	switch {
	case j.s.Policy == ERISOnly || j.s.Policy == ERISFirst:
		return Available, "it comes from blocks, because the policy prefers them"
	case nar < 0:
		return Available, "it comes from blocks, which are the only way"
	case first.bytes == 0:
		return Available, "it comes from blocks, which are all here"
	case !first.known:
		return Available, "it comes from blocks: they are preferred while the speed of the stores is not known"
	}
	return Available, fmt.Sprintf("it comes from blocks, which relieve the servers and should take %.1f s, where a nar takes %.1f s",
		first.time.Seconds(), j.ways[nar].time.Seconds())
}
