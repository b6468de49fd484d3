// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
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
		MaxBytes   int64 `json:"maxBytes"` // 0: no limit
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

	CoAP connectionStatistics `json:"coap"`
	HTTP connectionStatistics `json:"http"`
}

type connectionStatistics struct {
	Connections int64 `json:"connections"` // at the moment
	Accepted    int64 `json:"accepted"`
	TurnedAway  int64 `json:"turnedAway"` // there were too many
}

// statisticsOf collects the statistics of a server.
func statisticsOf(started time.Time, store *blockstore.Store, blocks *coapserver.Server, web *httpserver.Server) statistics {
	s := statistics{Version: version(), Started: started.UTC().Truncate(time.Second)}
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
	c := blocks.Stats()
	s.CoAP = connectionStatistics{int64(c.Connections), c.Accepted, c.TurnedAway}
	s.HTTP = connectionStatistics(web.Stats())
	return s
}

// text returns the JSON, in one line.
func (s statistics) text() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // it has nothing that JSON cannot express
	}
	return b
}

// askStatistics asks the server at a Unix socket for its statistics.
func askStatistics(socket string) (statistics, error) {
	s, err := readStatistics(socket)
	if err != nil {
		return s, fmt.Errorf("asking the block store at %s for its statistics: %w", socket, err)
	}
	return s, nil
}

func readStatistics(socket string) (s statistics, err error) {
	path, err := filepath.Abs(socket)
	if err != nil {
		return s, err
	}
	store, err := coap.Open((&url.URL{Scheme: "coap+unix", Path: path}).String(), coap.Options{})
	if err != nil {
		return s, err
	}
	defer store.Close()
	ctx, cancel := context.WithTimeout(context.Background(), statisticsTimeout)
	defer cancel()
	text, err := store.Document(ctx, statisticsPath)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(text, &s)
}
