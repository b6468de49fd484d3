// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/relay"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
)

// statisticsPath is the resource with the statistics of a running server, which it shows on Unix
// sockets.
const statisticsPath = "stats"

// statisticsTimeout is how long a server may take to send its statistics.
const statisticsTimeout = 30 * time.Second

// statistics is what a running server tells about itself, in JSON.
type statistics struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`

	Blocks struct {
		Count1KiB  int64 `json:"count1KiB"`
		Count32KiB int64 `json:"count32KiB"`
		Bytes      int64 `json:"bytes"`
		FreeBytes  int64 `json:"freeBytes"` // on the disk; 0: not known
		MaxBytes   int64 `json:"maxBytes"`  // 0: no limit
	} `json:"blocks"`

	// Since the start.
	Got struct {
		Found  int64 `json:"found"`
		Absent int64 `json:"absent"`
	} `json:"got"`
	Put struct {
		Acknowledged int64 `json:"acknowledged"` // held already, or stored
		HeldAlready  int64 `json:"heldAlready"`
		Failed       int64 `json:"failed"`
		Commits      int64 `json:"commits"`
		Waiting      int   `json:"waiting"` // at the moment
	} `json:"put"`
	Evicted   int64  `json:"evicted"`
	Damaged   int64  `json:"damaged"`
	LastError string `json:"lastError,omitempty"`

	CoAP admission.Stats `json:"coap"`
	HTTP admission.Stats `json:"http"`

	Upstreams *upstreamStatistics `json:"upstreams,omitempty"`
	Items     *itemStatistics     `json:"items,omitempty"`
}

// itemStatistics is what is made of store items; found and absent since the start.
type itemStatistics struct {
	Items   int   `json:"count"`
	Entries int64 `json:"blocks"`
	Bytes   int64 `json:"tableBytes"`
	Found   int64 `json:"found"`
	Absent  int64 `json:"absent"`
}

// upstreamStatistics is what was got from elsewhere since the start.
type upstreamStatistics struct {
	Found   int64             `json:"found"`
	Absent  int64             `json:"absent"`
	Late    int64             `json:"late"`    // of these, nobody answered in time
	Refused int64             `json:"refused"` // of these, the client had looked for too much in vain
	Stores  []storeStatistics `json:"stores"`
}

type storeStatistics struct {
	URL       string  `json:"url"`
	Requests  int64   `json:"requests"`
	Bytes     int64   `json:"bytes"`
	Misses    int64   `json:"misses"`
	Faults    int64   `json:"faults"`
	Failures  int64   `json:"failures"`
	Banned    bool    `json:"banned"`
	Resting   bool    `json:"resting"`
	Rate      float64 `json:"rate"`      // bytes per second; 0: not known
	RoundTrip float64 `json:"roundTrip"` // seconds; 0: not known
	LastError string  `json:"lastError,omitempty"`
}

func statisticsOf(started time.Time, store sharing, from *relay.Relay, blocks *coapserver.Server, web *httpserver.Server) statistics {
	s := statistics{Version: program.Version(), Started: started.UTC().Truncate(time.Second)}
	b := store.Stats()
	s.Blocks.Count1KiB, s.Blocks.Count32KiB = b.Blocks1KiB, b.Blocks32KiB
	s.Blocks.Bytes, s.Blocks.MaxBytes = b.Bytes1KiB+b.Bytes32KiB, b.MaxBytes
	s.Got.Found, s.Got.Absent = b.Hits, b.Misses
	s.Put.Acknowledged, s.Put.HeldAlready, s.Put.Failed = b.Puts, b.Duplicates, b.Failed
	s.Put.Commits, s.Put.Waiting = b.Commits, b.Queued
	s.Evicted, s.Damaged = b.Evicted, b.Damaged
	if b.Err != nil {
		s.LastError = fmt.Sprintf("%.500v", b.Err)
	}
	s.CoAP, s.HTTP = blocks.Stats(), web.Stats()
	if store.items != nil {
		i := itemStatistics(store.items.Stats())
		s.Items = &i
	}
	if from != nil {
		s.Upstreams = upstreamStatisticsOf(from.Stats())
	}
	return s
}

func upstreamStatisticsOf(r relay.Stats) *upstreamStatistics {
	u := &upstreamStatistics{Found: r.Found, Absent: r.Absent, Late: r.Late, Refused: r.Refused}
	for _, s := range r.Upstreams {
		of := storeStatistics{
			URL: s.URL, Requests: s.Requests, Bytes: s.Bytes, Misses: s.Misses, Faults: s.Faults, Failures: s.Failures,
			Banned: s.Banned, Resting: s.Resting, Rate: s.Rate, RoundTrip: s.RoundTrip.Seconds(),
		}
		if s.Err != nil {
			of.LastError = fmt.Sprintf("%.100v", s.Err)
		}
		u.Stores = append(u.Stores, of)
	}
	return u
}

// text returns the JSON, in one line.
func (s statistics) text() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // it has nothing that JSON cannot express
	}
	return b
}

// askStatistics asks the server that listens on the socket.
func (s *serveSettings) askStatistics() (socket string, answer statistics, err error) {
	if socket, err = s.socketPath(); err != nil {
		return socket, answer, err
	}
	path, err := filepath.Abs(socket)
	if err != nil {
		return socket, answer, err
	}
	store, err := coap.Open((&url.URL{Scheme: "coap+unix", Path: path}).String(), coap.Options{})
	if err != nil {
		return socket, answer, err
	}
	defer store.Close()
	ctx, cancel := context.WithTimeout(context.Background(), statisticsTimeout)
	defer cancel()
	text, err := store.Document(ctx, statisticsPath)
	if err == nil {
		err = json.Unmarshal(text, &answer)
	}
	return socket, answer, err
}
