// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/relay"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serverlog"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/status"
)

// Status is the command that shows what a running block store has and does.
func Status() *cobra.Command {
	var s serveSettings
	c := &cobra.Command{
		Short: "show what the running block store has and does",
		Long: `Show what the block store of this machine that is running has and does: what
"serve --stats" prints for programs.`,
		Args: message.NoArguments,
	}
	c.Flags().StringVar(&s.socket, "socket", "", "ask the server at the Unix socket `PATH` (default: that of serve)")
	c.RunE = func(*cobra.Command, []string) error {
		socket, answer, err := s.askStatistics()
		if err != nil {
			return err
		}
		return status.Print("block store at "+socket, answer.sections())
	}
	return c
}

func number(text, name string, value int64) status.Figure {
	return status.Figure{Text: text, Name: name, Value: float64(value)}
}

func yes(text, name string, value bool) status.Figure {
	f := status.Figure{Text: text, Name: name, Unit: "yes"}
	if value {
		f.Value = 1
	}
	return f
}

func size(text, name string, value int64) status.Figure {
	return status.Figure{Text: text, Name: name, Value: float64(value), Unit: "bytes"}
}

// sections shows the statistics to people and to monitoring.
func (s statistics) sections() []status.Section {
	blocks := []status.Figure{
		number("blocks of 32 KiB", "blocks_32kib", s.Blocks.Count32KiB),
		number("blocks of 1 KiB", "blocks_1kib", s.Blocks.Count1KiB),
		size("size", "block_bytes", s.Blocks.Bytes),
	}
	if s.Blocks.MaxBytes > 0 {
		blocks = append(blocks, size("size at most", "block_bytes_max", s.Blocks.MaxBytes))
	}
	if s.Blocks.FreeBytes > 0 {
		blocks = append(blocks, size("free on disk", "disk_free_bytes", s.Blocks.FreeBytes))
	}
	sections := []status.Section{
		{Title: "Blocks", Figures: append(blocks, number("evicted", "blocks_evicted_total", s.Evicted),
			number("damaged", "blocks_damaged_total", s.Damaged)), Error: s.LastError},
		{Title: "Requests", Figures: []status.Figure{
			number("found", "gets_found_total", s.Got.Found), number("absent", "gets_absent_total", s.Got.Absent),
			number("stored", "puts_total", s.Put.Acknowledged-s.Put.HeldAlready), number("held already", "puts_held_already_total", s.Put.HeldAlready),
			number("not stored, by faults", "puts_failed_total", s.Put.Failed), number("waiting to be stored", "puts_waiting", int64(s.Put.Waiting)),
		}},
		clients("Clients by CoAP", "coap_", s.CoAP), clients("Clients by HTTP", "http_", s.HTTP),
		{Title: "Program " + s.Version, Figures: []status.Figure{running(s.Started)}},
	}
	if s.Upstreams == nil {
		return sections
	}
	sections = append(sections, status.Section{Title: "From upstreams", Figures: []status.Figure{
		number("found", "upstream_found_total", s.Upstreams.Found), number("absent", "upstream_absent_total", s.Upstreams.Absent),
		number("absent because nobody answered in time", "upstream_late_total", s.Upstreams.Late),
		number("absent because the client had looked for too much", "upstream_refused_total", s.Upstreams.Refused),
	}})
	for _, u := range s.Upstreams.Stores {
		sections = append(sections, u.section())
	}
	return sections
}

func (u storeStatistics) section() status.Section {
	figures := []status.Figure{size("received", "upstream_bytes_total", u.Bytes)}
	if u.Rate > 0 {
		figures = append(figures, status.Figure{Text: "speed", Name: "upstream_rate", Value: u.Rate, Unit: "bytes/s"})
	}
	if u.RoundTrip > 0 {
		figures = append(figures, status.Figure{Text: "round trip", Name: "upstream_round_trip_seconds", Value: u.RoundTrip, Unit: "seconds"})
	}
	figures = append(figures,
		number("requests", "upstream_requests_total", u.Requests), number("misses", "upstream_misses_total", u.Misses),
		number("failures", "upstream_failures_total", u.Failures), number("wrong bytes", "upstream_faults_total", u.Faults),
		yes("left alone for a while", "upstream_resting", u.Resting), yes("not asked any more, for wrong bytes", "upstream_banned", u.Banned))
	for i := range figures {
		figures[i].Label = u.URL
	}
	return status.Section{Title: "Upstream " + u.URL, Error: u.LastError, Figures: figures}
}

func clients(title, prefix string, c admission.Stats) status.Section {
	return status.Section{Title: title, Figures: []status.Figure{
		number("connections", prefix+"connections", c.Connections), number("accepted", prefix+"connections_accepted_total", c.Accepted),
		number("turned away", prefix+"connections_turned_away_total", c.TurnedAway),
	}}
}

func running(since time.Time) status.Figure {
	return status.Figure{Text: "running for", Name: "uptime_seconds", Value: time.Since(since).Seconds(), Unit: "seconds"}
}

func publishSections(started time.Time, requests *serverlog.Requests, gate *admission.Gate) []status.Section {
	c := requests.Counts()
	return []status.Section{
		{Title: "Requests", Figures: []status.Figure{
			number("answered", "http_found_total", c.Found), number("for what is not here", "http_absent_total", c.Absent),
			number("refused", "http_refused_total", c.Refused), number("failed", "http_failed_total", c.Failed), size("sent", "http_sent_bytes_total", c.Bytes),
		}},
		clients("Clients", "http_", gate.Stats()),
		{Title: "Program", Figures: []status.Figure{running(started)}},
	}
}

// withStatus returns a handler that shows the status to this machine, and all else by the given
// one; Run of the status must be under way.
func (s *publishSettings) withStatus(handler http.Handler, gate *admission.Gate) (http.Handler, *status.Server) {
	requests := &serverlog.Requests{Handler: handler, Log: s.log.access()}
	started := time.Now()
	page := &status.Server{
		Title: "Substitute server", Collect: func() []status.Section { return publishSections(started, requests, gate) },
		Healthy: func() error { return nil }, Warnings: s.log.Warnings,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status.Serves(r.URL.Path) && status.OnThisMachine(r) {
			page.ServeHTTP(w, r)
			return
		}
		requests.ServeHTTP(w, r)
	}), page
}

// listenStatus listens where the status is shown, which must be on this machine alone.
func listenStatus(address string) (net.Listener, error) {
	if a, err := netip.ParseAddrPort(address); err != nil || !a.Addr().IsLoopback() {
		return nil, message.Usage("the option --status has the value %.100q: it must be an address of this machine alone and a port, like 127.0.0.1:8183", address)
	}
	return net.Listen("tcp", address)
}

// serveStatus shows the status to who comes to l, until ctx is done.
func serveStatus(ctx context.Context, l net.Listener, s *status.Server) error {
	const most = 16 // browsers have six
	var sampling sync.WaitGroup
	ctx, stop := context.WithCancel(ctx)
	sampling.Go(func() { s.Run(ctx.Done()) })
	defer sampling.Wait()
	defer stop()
	gate := admission.New(most, l, new(admission.Counts), nil)
	return gate.Serve(ctx, l, gate.Server(s))
}

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
	s.Blocks.Bytes, s.Blocks.MaxBytes = b.Bytes, b.MaxBytes
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
	socket, err = s.socketPath()
	system, _ := settings.DefaultSocket(0, "")
	if there(system) && !there(socket) && s.socket == "" {
		socket, err = system, nil // a user who runs none means that one
	}
	if err != nil {
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

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
