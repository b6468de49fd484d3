// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
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
	file string // empty if there is none
	text string // what it would have
	used string // what the file had when it was read last
	stop context.CancelFunc
	look sync.WaitGroup // that is under way
}

// looksAround reports whether stores of the local network are used: not where the daemon was told
// not to discover servers, or the settings say so.
func (s *Settings) looksAround() bool {
	wanted := true
	if told, ok := s.options["discover"]; ok {
		wanted = told == "true"
	}
	if s.file.DiscoverStores != nil {
		wanted = *s.file.DiscoverStores
	}
	return wanted && s.stores == "" && !settings.NoStores("", s.file) && s.Policy != substitute.HTTPOnly
}

// neighbours returns the stores of the local network, and looks for them if that is due.
func (s *Settings) neighbours() *neighbours {
	n := &neighbours{stop: func() {}}
	if s.daemon && s.looksAround() {
		n.file = s.inCache("neighbours")
	}
	if n.file != "" && !fresh(n.file) {
		ctx, stop := context.WithTimeout(context.Background(), browseTime)
		n.stop = stop
		n.look.Go(func() { n.browse(ctx) })
	}
	return n
}

// LookAround has later sessions use the stores of the local network, as helpers of the daemon do:
// those that they have found lately, or else those that answer now, which is written nowhere.
func (s *Settings) LookAround() {
	helper := *s
	helper.daemon = true
	s.near = &neighbours{stop: func() {}}
	directory := helper.KeepDirectory()
	if directory == "" || !s.looksAround() { // as helpers do not
		return
	}
	file := filepath.Join(directory, "neighbours")
	if text, err := files.ReadRegular(file, 64*maxNeighbours); err == nil && fresh(file) {
		s.near.text = string(text)
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), browseTime)
	defer stop()
	s.near.browse(ctx)
}

func fresh(file string) bool {
	info, err := os.Lstat(file)
	return err == nil && time.Since(info.ModTime()).Abs() < browseEvery
}

// browse writes down who answers, at once, for helpers that are waiting.
func (n *neighbours) browse(ctx context.Context) {
	defer n.stop()
	var urls []string
	found := func(a netip.AddrPort) {
		if len(urls) < maxNeighbours {
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
	if n.file == "" {
		n.text = strings.Join(urls, "")
		return
	}
	_ = files.Write(n.file, 0o600, files.Options{}, []byte(strings.Join(urls, "")))
}

func (n *neighbours) urls() []string {
	n.used = n.read()
	var urls []string
	for url := range strings.FieldsSeq(n.used) {
		if u, err := storeurl.Parse(url); err == nil && u.Scheme == "coap+tcp" && len(urls) < maxNeighbours {
			urls = append(urls, u.String())
		}
	}
	return urls
}

// changed reports whether there are others than when urls was called.
func (n *neighbours) changed() bool { return n.read() != n.used }

// awaited waits for the end of what is under way, and reports whether that, or another helper, has
// changed anything.
func (n *neighbours) awaited() bool {
	n.look.Wait()
	return n.changed()
}

func (n *neighbours) read() string {
	if n.file == "" {
		return n.text
	}
	text, _ := files.ReadState(n.file, 64*maxNeighbours)
	return string(text)
}

func (n *neighbours) close() {
	n.stop()
	n.look.Wait()
}
