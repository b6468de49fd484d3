// SPDX-License-Identifier: GPL-3.0-or-later

package substitute

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/decompress"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/image"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/seed"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/throughput"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// How fast compressed archives are decompressed, and made by a server that has not made them
// before, in bytes of the archive per second on one core.
var (
	decompressRates = map[string]float64{
		"none": 1500e6, "zstd": 600e6, "gzip": 220e6, "lzip": 100e6, "xz": 80e6, "bzip2": 30e6,
	}
	compressRates = map[string]float64{
		"none": 1000e6, "zstd": 100e6, "gzip": 20e6, "lzip": 1e6, "xz": 1e6, "bzip2": 5e6,
	}
)

// unknownRatio is how many times smaller a compressed nar is of which the length is not known.
const unknownRatio = 3.5

// A narWay is a nar at a URL.
type narWay struct {
	j    *job
	url  string
	from narinfo.URL
}

// narURL returns where something is that a narinfo offers, or why it cannot be had.
func narURL(r record, value string) (string, error) {
	base, _, _ := strings.Cut(r.server.url, "?") // as narinfos are requested
	url, err := narinfo.ResolveURL(base, value)
	if err == nil {
		err = mirror.CheckURL(url)
	}
	// Whoever sends narinfos over a network has no business with our files.
	if err == nil && mirror.IsLocal(url) && !mirror.IsLocal(r.server.url) {
		err = fmt.Errorf("%s names a local file, %.300q", r.server.name, url)
	}
	return url, err
}

// listNars adds the nars that narinfos offer.
func (j *job) listNars(records []record) {
	if j.s.Policy == ERISOnly {
		return
	}
	for _, r := range records {
		for _, u := range r.narinfo.PreferredURLs() {
			url, err := narURL(r, u.URL)
			switch {
			case err != nil:
				j.log.Warnf("%s: %v", j.path, err)
			case !j.listed[url]:
				j.listed[url] = true
				j.ways = append(j.ways, &candidate{way: &narWay{j, url, u}, kind: "nar", pace: pace{slowTime, slowTime, 10, 0}, from: r})
			}
		}
	}
}

func (w *narWay) String() string { return mirror.WithoutUser(w.url) }

func (w *narWay) expect(context.Context) expectation {
	method := w.from.Compression
	speed := w.j.s.serverSpeed(w.url)
	size := float64(min(w.j.want.NarSize, 1<<62))
	length, made := float64(min(w.from.FileSize, 1<<62)), 0.0
	if !w.from.SizeKnown {
		// It is made while it is sent.
		length, made = size, size/compressRates[method]
		if method != "none" {
			length /= unknownRatio
		}
	}
	took := max(length/speed.Rate, made) + size/decompressRates[method]
	return expectation{
		int64(length), 2*speed.Latency + throughput.Seconds(took), speed.Known,
		fmt.Sprintf("compression %s, %s", method, speed),
	}
}

func (w *narWay) nodes(ctx context.Context, a *attempt) (nar.Nodes, func(), error) {
	j, method := w.j, w.from.Compression
	size := int64(-1)
	if method == "none" {
		size = int64(min(j.want.NarSize, 1<<62))
	}
	body, err := j.download(ctx, a, w.url, size)
	if err != nil {
		return nil, nil, err
	}
	var source io.Reader = body
	if !body.nar.Decoded && !mirror.IsLocal(w.url) && seedable(a.records, method) {
		body.copied = j.s.Seeds.Begin(j.want.NarSize)
		source = io.TeeReader(body, body.copied)
	}
	if method == "gzip" && body.nar.Decoded {
		method = decompress.PerhapsGzip // some servers call a file that is compressed itself encoded
	}
	plain, err := decompress.OpenAtMost(method, source, int64(min(j.options().MaxBytes, 1<<62)))
	if err != nil {
		body.done()
		return nil, nil, err
	}
	reader, closeNodes := image.ReadNar(ctx, plain, j.want.NarSize)
	reader.Ended = body.nar.Last
	if method == "none" {
		reader.Ended = body.nar.Whole
	}
	return reader, func() {
		closeNodes()
		plain.Close()
		body.done()
	}, nil
}

// failed takes the other nars of a server out of the list if this one trickled: they are no faster.
func (w *narWay) failed(_ context.Context, err error) {
	if !errors.As(err, new(trickleError)) {
		return
	}
	isBeside := func(c *candidate) bool {
		o, ok := c.way.(*narWay)
		return ok && serverOf(o.url) == serverOf(w.url)
	}
	w.j.ways, w.j.later = slices.DeleteFunc(w.j.ways, isBeside), slices.DeleteFunc(w.j.later, isBeside)
}

// seedable reports whether others may look for blocks of the nar with a compression: not if it is
// known that there are read capabilities of other nars only.
func seedable(records []record, method string) bool {
	others := false
	for _, r := range records {
		for _, e := range r.narinfo.ERIS {
			if e.Form == "nar."+method {
				return true
			}
			others = others || e.Form != ""
		}
	}
	return !others && method != "none"
}

// unquoted is an error of an attempt, without anything that a local file contains, or that
// strangers have named.
func (j *job) unquoted(a *attempt, err error) error {
	_, ofFile := errors.AsType[syscall.Errno](err)
	transfer := !mirror.IsLocal(a.url) && (!j.s.Strangers || a.cut.Load() || a.ctx.Err() != nil)
	if a.url == "" || transfer || ofFile {
		return err
	}
	return errUnquoted
}

// A download is the bytes that a server sends. They give way to what somebody waits for, if nobody
// waits for them.
type download struct {
	nar     *mirror.Nar
	r       io.Reader // of it, within the limit of the rate
	latency time.Duration
	n       atomic.Int64 // bytes that have come
	waited  atomic.Int64 // in Read, in nanoseconds
	copied  *seed.Copy   // for others; nil is none
	a       *attempt
}

// download begins to fetch what a server has at a URL, of size bytes if the server does not say;
// negative is unknown. The caller must call done.
func (j *job) download(ctx context.Context, a *attempt, url string, size int64) (*download, error) {
	begin := time.Now()
	body, err := j.openNar(ctx, a, url)
	if err != nil {
		return nil, err
	}
	d := &download{nar: body, r: body, latency: time.Since(begin), a: a}
	if body.Size >= 0 {
		size = body.Size
		a.total.Store(size)
	}
	a.url = url
	j.progress.From(body.URL, size)
	if !mirror.IsLocal(url) {
		d.r = ratelimit.Reader(ctx, body, j.s.Limiter)
		body.Again = func(n int) {
			a.read.Add(int64(n))
			d.n.Add(int64(n))
			j.s.Limiter.Wait(ctx, n)
		}
	}
	return d, nil
}

// Read implements [io.Reader].
func (d *download) Read(p []byte) (int, error) {
	read := d.r.Read
	if d.a.j.waited() {
		read = func(p []byte) (int, error) { return d.a.j.s.order.Read(d.r, p) }
	} else {
		d.a.j.s.order.GiveWay(d.a.ctx)
	}
	begin := time.Now()
	n, err := read(p)
	d.waited.Add(int64(time.Since(begin)))
	d.n.Add(int64(n))
	d.a.countShown(n, n)
	if err != nil && err != io.EOF && d.a.ctx.Err() == nil && !errors.Is(err, mirror.ErrChanged) {
		d.a.cut.Store(true)
	}
	return n, err
}

// done ends the download, and learns from it how fast the server is.
func (d *download) done() {
	whole := d.a.ok && d.nar.Drain(d.copied)
	d.copied.End(whole)
	d.nar.Close()
	// One that was given up is known to be slow.
	if !mirror.IsLocal(d.a.url) && (d.a.ok || d.a.slow.Load()) {
		bytes, waited := d.n.Load(), time.Duration(d.waited.Load())
		if bytes < LeastMeasured {
			bytes, waited = 0, 0
		}
		d.a.j.s.State.Measured(serverOf(d.a.url), bytes, max(waited, time.Millisecond), d.latency)
	}
}

// openNar opens a nar. Servers that keep silent have little time in all.
func (j *job) openNar(ctx context.Context, a *attempt, url string) (*mirror.Nar, error) {
	begin := time.Now()
	if j.silence > 0 {
		left := max(mostSilence-j.silence, mostSilence/8)
		defer time.AfterFunc(left, func() { a.cancel(errSilent) }).Stop()
	}
	body, err := j.s.Mirrors.OpenNar(ctx, url, a.again)
	if took := time.Since(begin); err != nil && took >= slowTime/8 {
		j.silence += took
	}
	return body, err
}
