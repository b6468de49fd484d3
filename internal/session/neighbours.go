// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

const (
	// browseTime is for how long answers of the local network are waited for.
	browseTime = 300 * time.Millisecond
	// browseEvery is after how long the network is asked again, by whichever helper comes then.
	browseEvery = 10 * time.Minute
	// maxNeighbours is how many block stores of the local network are used.
	maxNeighbours = 16
)

// neighbours are the block stores of the local network. A file has those that helpers have found,
// and when; nobody waits for them as long as items come from elsewhere.
type neighbours struct {
	file string        // empty if none are looked for
	used string        // what the file had when it was read last
	done chan struct{} // closed when what is under way has ended; nil if nothing is
	stop context.CancelFunc
}

// neighbours returns the stores of the local network, and looks for them if that is due. They are
// not looked for where the daemon was told not to discover servers, or the settings say so.
func (s *Settings) neighbours() *neighbours {
	policy, _ := s.Policy()
	wanted := true
	if told, ok := s.options.Get("discover"); ok {
		wanted = told == "true"
	}
	if s.file.DiscoverStores != nil {
		wanted = *s.file.DiscoverStores
	}
	n := &neighbours{stop: func() {}}
	if !wanted || !s.daemon || s.stores == "none" || policy == substitute.HTTPOnly {
		return n
	}
	if n.file = s.inCache("neighbours"); n.file == "" {
		return n
	}
	if info, err := os.Lstat(n.file); err == nil && time.Since(info.ModTime()).Abs() < browseEvery {
		return n
	}
	ctx, stop := context.WithTimeout(context.Background(), browseTime)
	n.stop, n.done = stop, make(chan struct{})
	go n.browse(ctx)
	return n
}

// browse writes down who answers, at once, for helpers that are waiting.
func (n *neighbours) browse(ctx context.Context) {
	defer close(n.done)
	defer n.stop()
	own := ownAddresses()
	var urls []string
	found := func(a netip.AddrPort) {
		if len(urls) < maxNeighbours && !slices.Contains(own, a.Addr()) {
			urls = append(urls, fmt.Sprintf("coap+tcp://%s\n", a))
			n.write(urls)
		}
	}
	err := lan.Browse(ctx, lan.Blocks, found)
	if len(urls) == 0 && (err != nil || errors.Is(ctx.Err(), context.DeadlineExceeded)) {
		n.write(nil) // so that it is not tried again at once
	}
}

// write is for others; who cannot be told looks by itself.
func (n *neighbours) write(urls []string) {
	_ = files.Write(n.file, 0o600, files.Options{}, []byte(strings.Join(urls, "")))
}

// urls returns the stores that have been found.
func (n *neighbours) urls() []string {
	n.used = n.read()
	var urls []string
	for url := range strings.FieldsSeq(n.used) {
		if _, err := storeurl.Parse(url); err == nil && len(urls) < maxNeighbours {
			urls = append(urls, url)
		}
	}
	return urls
}

// changed reports whether there are others than when urls was called.
func (n *neighbours) changed() bool { return n.file != "" && n.read() != n.used }

// awaited waits for the end of what is under way, and reports whether it has changed anything.
func (n *neighbours) awaited() bool {
	if n.done == nil {
		return false
	}
	<-n.done
	n.done = nil
	return n.changed()
}

func (n *neighbours) read() string {
	if n.file == "" {
		return ""
	}
	text, _ := files.ReadState(n.file, 64*maxNeighbours)
	return string(text)
}

// close waits for what is under way.
func (n *neighbours) close() {
	n.stop()
	if n.done != nil {
		<-n.done
	}
}

// ownAddresses returns those of this machine, whose own store is reached by its socket.
func ownAddresses() (own []netip.Addr) {
	all, _ := net.InterfaceAddrs()
	for _, a := range all {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, prefix.Addr().Unmap())
		}
	}
	return own
}
