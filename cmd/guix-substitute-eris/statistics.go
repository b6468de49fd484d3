// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// statisticsPath is the resource with the statistics of a running server, which it shows on Unix
// sockets.
const statisticsPath = "stats"

// statistics is what a running server tells about itself, in JSON.
type statistics struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`

	Blocks struct {
		Count1KiB   int64 `json:"count1KiB"`
		Count32KiB  int64 `json:"count32KiB"`
		Bytes       int64 `json:"bytes"`
		MaxBytes    int64 `json:"maxBytes"` // 0: no limit
		PinnedCount int64 `json:"pinnedCount"`
		PinnedBytes int64 `json:"pinnedBytes"`
	} `json:"blocks"`

	// Since the start.
	Got struct {
		Found  int64 `json:"found"`
		Absent int64 `json:"absent"`
	} `json:"got"`
	Put struct {
		Acknowledged int64 `json:"acknowledged"` // held already, or stored
		HeldAlready  int64 `json:"heldAlready"`
		NoRoom       int64 `json:"noRoom"`
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
func statisticsOf(started time.Time, store *blockstore.Store, coap *coapserver.Server, web *httpserver.Server) statistics {
	s := statistics{Version: version(), Started: started.UTC().Truncate(time.Second)}
	b := store.Stats()
	s.Blocks.Count1KiB, s.Blocks.Count32KiB = b.Blocks1KiB, b.Blocks32KiB
	s.Blocks.Bytes, s.Blocks.MaxBytes = b.Bytes1KiB+b.Bytes32KiB, b.MaxBytes
	s.Blocks.PinnedCount, s.Blocks.PinnedBytes = b.PinnedBlocks, b.PinnedBytes
	s.Got.Found, s.Got.Absent = b.Hits, b.Misses
	s.Put.Acknowledged, s.Put.HeldAlready, s.Put.NoRoom, s.Put.Failed = b.Puts, b.Duplicates, b.Refused, b.Failed
	s.Put.Commits, s.Put.Waiting = b.Commits, b.Queued
	s.Evicted, s.Damaged = b.Evicted, b.Damaged
	if b.Err != nil {
		s.LastError = fmt.Sprintf("%.500v", b.Err)
	}
	c := coap.Stats()
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
	conn, err := net.DialTimeout("unix", socket, 10*time.Second)
	if err != nil {
		return s, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return s, err
	}
	path := coap.AppendOption(nil, 0, message.URIPath, statisticsPath)
	request := coap.AppendMessage(coap.AppendCapabilities(nil, coap.MessageSize), codes.GET, coap.MakeToken(1), path, "")
	if _, err := conn.Write(request); err != nil {
		return s, err
	}
	reader := coap.NewReader(conn, coap.MessageSize, nil)
	for range 100 {
		head, whole, err := reader.Wait()
		if err != nil {
			return s, err
		}
		if !whole {
			return s, errors.New("answer is too long")
		}
		_, body, _, err := reader.Buffered()
		if err != nil {
			return s, err
		}
		if !coap.IsResponse(head.Code) || head.Token != coap.MakeToken(1) {
			continue
		}
		if head.Code != codes.Content {
			return s, fmt.Errorf("it answers %s", coap.CodeText(head.Code))
		}
		var response coap.Response
		options := coap.ParseOptions(body)
		if err := coap.ParseResponse(&options, &response); err != nil {
			return s, err
		}
		return s, json.Unmarshal(options.Payload(), &s)
	}
	return s, errors.New("it does not answer")
}
