// SPDX-License-Identifier: GPL-3.0-or-later

// Package status shows what a server has and does: to people on a terminal or in a browser, which
// needs no JavaScript, and to monitoring in the text format of Prometheus. All three are made of
// the same figures.
package status

import (
	"fmt"
	"html"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/serverlog"
)

// A Figure is a number, and what it says.
type Figure struct {
	Text  string  `json:"text"`            // for people, "blocks found" for instance
	Name  string  `json:"name"`            // for monitoring, in snake case without a prefix; a counter ends in _total
	Label string  `json:"label,omitempty"` // of the same name, what this one is about; empty if there is but one
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"` // "", "bytes", "bytes/s", "seconds", or "yes" for what is or is not
}

// counter reports whether the number only grows, so that its rate is of interest.
func (f Figure) counter() bool { return strings.HasSuffix(f.Name, "_total") }

func (f Figure) String() string {
	switch f.Unit {
	case "bytes":
		return page.Size(int64(f.Value))
	case "bytes/s":
		return page.Size(int64(f.Value)) + "/s"
	case "seconds":
		if f.Value < 60 {
			return page.Duration(time.Duration(f.Value * float64(time.Second)))
		}
		return (time.Duration(f.Value) * time.Second).String()
	case "yes":
		return map[bool]string{true: "yes", false: "no"}[f.Value != 0]
	}
	return strconv.FormatFloat(f.Value, 'f', -1, 64)
}

// A Section is figures about one thing.
type Section struct {
	Title   string   `json:"title"`           // may come from anybody
	Error   string   `json:"error,omitempty"` // what went wrong last, if anything
	Figures []Figure `json:"figures"`
}

// Print prints sections on a terminal.
func Print(title string, sections []Section) error {
	p := page.New()
	p.Line(0, "%s", title)
	for _, s := range sections {
		p.Heading(s.Title)
		for _, f := range s.Figures {
			p.Line(2, "%s: %s", f.Text, f)
		}
		if s.Error != "" {
			p.Say(2, page.Bad, "%s", s.Error)
		}
	}
	return p.Print()
}

// prefix begins the names of all metrics.
const prefix = "guix_substitute_eris_"

// Metrics returns sections in the text format of Prometheus, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/), which wants all of one name
// together.
func Metrics(sections []Section) string {
	var names []string
	lines := map[string]string{}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	for _, s := range sections {
		for _, f := range s.Figures {
			if lines[f.Name] == "" {
				names = append(names, f.Name)
				kind := map[bool]string{true: "counter", false: "gauge"}[f.counter()]
				lines[f.Name] = fmt.Sprintf("# HELP %s%s %s\n# TYPE %[1]s%[2]s %[4]s\n", prefix, f.Name, f.Text, kind)
			}
			label := ""
			if f.Label != "" {
				label = `{of="` + escape.Replace(f.Label) + `"}`
			}
			lines[f.Name] += prefix + f.Name + label + " " + strconv.FormatFloat(f.Value, 'g', -1, 64) + "\n"
		}
	}
	var b strings.Builder
	for _, name := range names {
		b.WriteString(lines[name])
	}
	return b.String()
}

// minutes is for how many minutes the rates of counters are kept.
const minutes = 60

// A Server serves the status of another server over HTTP: a page at /, /metrics and /healthz. It
// answers on this machine alone: who asks under another name than one of its own is refused, since
// the page of a stranger can have a browser do so. Run must be under way. It is an http.Handler.
type Server struct {
	Title    string
	Collect  func() []Section // is safe for concurrent use, as are the others
	Healthy  func() error
	Warnings func() []serverlog.Warning

	mu      sync.Mutex
	samples []map[[2]string]float64 // of counters by name and label, one per minute, the newest last
}

// Run notes what has been counted, once a minute, until done is closed.
func (s *Server) Run(done <-chan struct{}) {
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	s.sample()
	for {
		select {
		case <-ticker.C:
			s.sample()
		case <-done:
			return
		}
	}
}

func (s *Server) sample() {
	values := map[[2]string]float64{}
	for _, section := range s.Collect() {
		for _, f := range section.Figures {
			if f.counter() {
				values[[2]string{f.Name, f.Label}] = f.Value
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.samples = append(s.samples[max(0, len(s.samples)-minutes+1):], values)
}

// rates returns by how much a counter has grown in each of the last minutes, the last of which is
// not over.
func (s *Server) rates(f Figure) (rates [minutes]float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	later := f.Value
	for i := range s.samples {
		earlier, ok := s.samples[len(s.samples)-1-i][[2]string{f.Name, f.Label}]
		if !ok {
			break // it was not known then
		}
		rates[minutes-1-i], later = max(0, later-earlier), earlier
	}
	return rates
}

// OnThisMachine reports whether a request comes from this machine, asks under one of its own names,
// and was not passed on by a proxy that says so, or that speaks HTTP/1.0, as nginx does where
// nothing else is set, which says nothing of its clients.
func OnThisMachine(r *http.Request) bool {
	said := func(header string) bool { return r.Header.Get(header) != "" }
	if !r.ProtoAtLeast(1, 1) || slices.ContainsFunc([]string{"Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip"}, said) {
		return false
	}
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	named, _ := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && remote.Addr().Unmap().IsLoopback() && (strings.EqualFold(host, "localhost") || named.IsLoopback())
}

// Serves reports whether a path is one of those of a Server.
func Serves(path string) bool { return path == "/" || path == "/metrics" || path == "/healthz" }

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	switch {
	case !OnThisMachine(r):
		http.Error(w, "ask on this machine, at localhost or 127.0.0.1", http.StatusForbidden)
	case r.Method != http.MethodGet && r.Method != http.MethodHead || !Serves(r.URL.Path):
		http.NotFound(w, r)
	case r.URL.Path == "/metrics":
		h.Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		fmt.Fprint(w, Metrics(s.Collect()))
	case r.URL.Path == "/healthz":
		if err := s.Healthy(); err != nil {
			http.Error(w, page.Clean(err.Error()), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	default:
		h.Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, s.html())
	}
}

const head = `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="60"><title>%[1]s</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%% }
th, td { padding: .15rem .6rem .15rem 0; border-bottom: 1px solid #8884; text-align: left; font-weight: normal }
th { width: 18rem } td { font-variant-numeric: tabular-nums } td.graph { text-align: right; font-size: .8rem }
svg { vertical-align: middle; fill: #2a78c8; background: #8882 }
.error { color: #c22; overflow-wrap: anywhere }
</style></head><body><h1>%[1]s</h1>
`

func (s *Server) html() string {
	var b strings.Builder
	fmt.Fprintf(&b, head, html.EscapeString(s.Title))
	for _, section := range s.Collect() {
		fmt.Fprintf(&b, "<h2>%s</h2>\n<table>\n", html.EscapeString(page.Clean(section.Title)))
		for _, f := range section.Figures {
			graph := ""
			if f.counter() {
				graph = svg(f, s.rates(f))
			}
			fmt.Fprintf(&b, "<tr><th>%s</th><td>%s</td><td class=\"graph\">%s</td></tr>\n", html.EscapeString(f.Text), html.EscapeString(f.String()), graph)
		}
		b.WriteString("</table>\n")
		if section.Error != "" {
			fmt.Fprintf(&b, "<p class=\"error\">%s</p>\n", html.EscapeString(page.Clean(section.Error)))
		}
	}
	b.WriteString("<h2>Last warnings</h2>\n")
	warnings := s.Warnings()
	for _, w := range warnings {
		fmt.Fprintf(&b, "<p class=\"error\">%s %s</p>\n", w.Time.UTC().Format("2006-01-02 15:04:05 UTC"), html.EscapeString(w.Text))
	}
	if len(warnings) == 0 {
		b.WriteString("<p>There were none.</p>\n")
	}
	b.WriteString("<p>Graphs show the last hour by the minute. See also <a href=\"/metrics\">/metrics</a> and <a href=\"/healthz\">/healthz</a>.</p>\n</body></html>\n")
	return b.String()
}

// svg draws how much a counter has grown in each minute, as bars of 32 pixels at most; nothing is
// drawn of nothing.
func svg(f Figure, rates [minutes]float64) string {
	most, bars := slices.Max(rates[:]), ""
	for i, rate := range rates {
		if rate > 0 {
			height := max(1, math.Round(rate/most*32))
			bars += fmt.Sprintf(`<rect x="%d" y="%g" width="5" height="%g"/>`, i*6, 32-height, height)
		}
	}
	if most == 0 {
		return ""
	}
	f.Value = most
	text := fmt.Sprintf("at most %s per minute", f)
	return fmt.Sprintf(`%s <svg width="%d" height="32" role="img" aria-label="%[1]s">%[3]s</svg>`, html.EscapeString(text), minutes*6, bars)
}
