// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/relay"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
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
	asJSON := c.Flags().Bool("json", false, "print what is known as JSON")
	c.RunE = func(*cobra.Command, []string) error {
		socket, answer, err := s.askStatistics()
		switch {
		case err != nil:
			return err
		case *asJSON:
			return page.JSON(answer)
		}
		return status.Print("block store at "+socket, answer)
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

// sections are the statistics of the server, for people and for monitoring.
func (s *serveSettings) sections(started time.Time, store sharing, from *relay.Relay, blocks *coapserver.Server, web *httpserver.Server) []status.Section {
	b := store.Stats()
	figures := []status.Figure{
		number("blocks of 32 KiB", "blocks_32kib", b.Blocks32KiB),
		number("blocks of 1 KiB", "blocks_1kib", b.Blocks1KiB),
		size("size", "block_bytes", b.Bytes),
	}
	if b.MaxBytes > 0 {
		figures = append(figures, size("size at most", "block_bytes_max", b.MaxBytes))
	}
	if room, err := files.RoomIn(s.directory); err == nil {
		figures = append(figures, size("free on disk", "disk_free_bytes", room.Free))
	}
	sections := []status.Section{
		{Title: "Blocks", Figures: append(figures, number("evicted", "blocks_evicted_total", b.Evicted),
			number("damaged", "blocks_damaged_total", b.Damaged)), Error: errorText(b.Err)},
		{Title: "Requests", Figures: []status.Figure{
			number("found", "gets_found_total", b.Hits), number("absent", "gets_absent_total", b.Misses),
			number("stored", "puts_total", b.Puts-b.Duplicates), number("held already", "puts_held_already_total", b.Duplicates),
			number("not stored, by faults", "puts_failed_total", b.Failed), number("waiting to be stored", "puts_waiting", int64(b.Queued)),
		}},
		clients("Clients by CoAP", "coap_", blocks.Stats()), clients("Clients by HTTP", "http_", web.Stats()),
		{Title: "Program " + program.Version(), Figures: []status.Figure{running(started)}},
	}
	if store.items != nil {
		i := store.items.Stats()
		sections = append(sections, status.Section{Title: "Store items", Figures: []status.Figure{
			number("items", "items", int64(i.Items)), number("blocks", "item_blocks", i.Entries), size("size of their table", "item_table_bytes", i.Bytes),
			number("found", "item_gets_found_total", i.Found), number("absent", "item_gets_absent_total", i.Absent),
		}})
	}
	if from == nil {
		return sections
	}
	u := from.Stats()
	sections = append(sections, status.Section{Title: "From upstreams", Figures: []status.Figure{
		number("found", "upstream_found_total", u.Found), number("absent", "upstream_absent_total", u.Absent),
		number("absent because nobody answered in time", "upstream_late_total", u.Late),
		number("absent because the client had looked for too much", "upstream_refused_total", u.Refused),
	}})
	for _, s := range u.Upstreams {
		sections = append(sections, upstream(s))
	}
	return sections
}

func upstream(u pool.SourceStats) status.Section {
	figures := []status.Figure{size("received", "upstream_bytes_total", u.Bytes)}
	if u.Rate > 0 {
		figures = append(figures, status.Figure{Text: "speed", Name: "upstream_rate", Value: u.Rate, Unit: "bytes/s"})
	}
	if u.RoundTrip > 0 {
		figures = append(figures, status.Figure{Text: "round trip", Name: "upstream_round_trip_seconds", Value: u.RoundTrip.Seconds(), Unit: "seconds"})
	}
	figures = append(figures,
		number("requests", "upstream_requests_total", u.Requests), number("misses", "upstream_misses_total", u.Misses),
		number("failures", "upstream_failures_total", u.Failures), number("wrong bytes", "upstream_faults_total", u.Faults),
		yes("left alone for a while", "upstream_resting", u.Resting), yes("not asked any more, for wrong bytes", "upstream_banned", u.Banned))
	for i := range figures {
		figures[i].Label = u.URL
	}
	return status.Section{Title: "Upstream " + u.URL, Error: errorText(u.Err), Figures: figures}
}

// errorText returns what a page has room for.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf("%.500v", err)
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
	return gate.Serve(ctx, gate.Server(s))
}

const (
	// statisticsPath is the resource with the statistics of a running server, which it shows on
	// Unix sockets: sections as JSON, in gzip, for of a document there may be 32 KiB.
	statisticsPath = "stats"
	// statisticsTimeout is how long a server may take to send them, and maxStatistics how many
	// bytes they may be.
	statisticsTimeout = 8 * time.Second
	maxStatistics     = 4 << 20
)

func packed(sections []status.Section) []byte {
	var text bytes.Buffer
	z := gzip.NewWriter(&text)
	_ = json.NewEncoder(z).Encode(sections) // has nothing that JSON cannot express
	z.Close()
	return text.Bytes()
}

func unpacked(text []byte) (sections []status.Section, err error) {
	z, err := gzip.NewReader(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	err = json.NewDecoder(io.LimitReader(z, maxStatistics)).Decode(&sections)
	return sections, err
}

// askStatistics asks the server that listens on the socket.
func (s *serveSettings) askStatistics() (socket string, answer []status.Section, err error) {
	socket, err = s.socketPath()
	system, _ := settings.DefaultSocket(0, "")
	if there(system) && !there(socket) && s.socket == "" {
		socket, err = system, nil // a user who runs none means that one
	}
	if err != nil {
		return socket, answer, err
	}
	store, err := coap.Open((&url.URL{Scheme: "coap+unix", Path: socket}).String(), coap.Options{})
	if err != nil {
		return socket, answer, err
	}
	defer store.Close()
	ctx, cancel := context.WithTimeout(context.Background(), statisticsTimeout)
	defer cancel()
	text, err := store.Document(ctx, statisticsPath)
	if err == nil {
		answer, err = unpacked(text)
	}
	return socket, answer, err
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
