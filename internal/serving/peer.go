// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"context"
	"errors"
	"fmt"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/peers"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/relay"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/backoff"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
)

// keepAlive is how often connections to --peer are used at least: routers that translate addresses
// forget those that are not, some after a minute.
const keepAlive = 30 * time.Second

// Rests between connections to a --peer.
const leastPeerRest, mostPeerRest = time.Second, 5 * time.Minute

var errEnded = errors.New("the connection has ended")

// openPeers opens servers that are given blocks over connections that we make.
func (s *serveSettings) openPeers() (peers []*coap.Store, err error) {
	for _, url := range s.peers {
		_, err := storeurl.ParseScheme(url, "coap+tcp", "coaps+tcp", "coap+ws", "coaps+ws", "coap+unix")
		var store *coap.Store
		if err == nil {
			store, err = coap.Open(url, coap.Options{})
		}
		if err != nil {
			return nil, fmt.Errorf("--peer: %w", err)
		}
		peers = append(peers, store)
	}
	return peers, nil
}

// newGroup returns the group of those who connect to the endpoints, whose other clients get what
// they have; nil without --relay. By UDP senders can be forged, so that these clients only do where
// the URL says so.
func (s *serveSettings) newGroup(endpoints []*endpoint) *peers.Group {
	if !s.relay {
		return nil
	}
	g := peers.New(func(host string, err error) {
		s.log.Error("peer gave wrong bytes and is not asked for a while:", "host", host, "error", err)
	})
	for _, e := range endpoints {
		e.relay = e.relay || e.Get && e.packets == nil
		if e.scheme != "coap+unix" {
			e.Connected = g.Join
		}
	}
	return g
}

// maxUpstreams leaves room for the group.
const maxUpstreams = relay.MaxUpstreams - 1

// openMembers opens the upstreams, whose requests are to say that they may go through so many
// servers, and the group unless it is nil.
func (s *serveSettings) openMembers(connected *peers.Group, hops int) ([]pool.Member, error) {
	members, err := settings.OpenStores(s.upstreams, hops)
	if connected == nil {
		return members, err
	}
	return append(members, pool.Member{Source: connected.Source()}), err
}

// servePeer connects to a peer, and again whenever that has ended, and gives it the blocks of the
// store, and nothing that is got from elsewhere for it, until ctx is done.
func (s *serveSettings) servePeer(ctx context.Context, p *coap.Store, server *coapserver.Server) {
	defer p.Close()
	rest := backoff.Backoff{Min: leastPeerRest, Max: mostPeerRest}
	for ctx.Err() == nil {
		began := time.Now()
		conn, err := p.Dial(ctx)
		if err == nil {
			s.log.Info("serving the peer", "url", p.String())
			server.ServeConn(ratelimit.Conn(conn, s.sending), coapserver.Access{Get: true, KeepAlive: keepAlive})
			err = errEnded
		}
		if time.Since(began) > keepAlive {
			rest.Succeed()
		}
		wait := rest.Fail(time.Now(), 0)
		if ctx.Err() == nil {
			s.log.Warn("the peer is tried again:", "url", p.String(), "in", wait.Round(time.Second).String(), "error", message.OfStore(p.String(), err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}
