// SPDX-License-Identifier: GPL-3.0-or-later

// Package serving has the commands that serve until they are told to stop: serve keeps blocks, and
// publish offers narinfos and nars.
package serving

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	coapmessage "github.com/plgd-dev/go-coap/v3/message"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/httpserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/coap"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/peers"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/pool"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/relay"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/ratelimit"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/status"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/systemd"
)

// serveSettings are the options of serve.
type serveSettings struct {
	itemSettings
	items                   bool
	directory, socket       string
	socketMode, socketGroup string
	listen, upstreams       []string
	peers                   []string
	maxSize, limitRate      int64 // 0: no limit
	sending                 *ratelimit.Limiter
	maxConnections          int
	stats, advertise, relay bool
	advertised              uint16 // the port
	user                    runAs
	log                     logSettings
	status                  string       // where the status is shown
	statusListener          net.Listener // the same
}

// checkPeriod is how often it is looked whether the store still works.
const checkPeriod = 5 * time.Second

// stopTime is how long clients get when the server stops.
const stopTime = 5 * time.Second

// Serve is the command that keeps blocks and serves them.
func Serve() *cobra.Command {
	var s serveSettings
	c := &cobra.Command{
		Short: "keep blocks and serve them",
		Long: `Keep blocks in a directory and serve them by CoAP on a Unix socket, and wherever
else --listen says. URLs of --listen are

  coap+tcp://HOST:PORT    CoAP over TCP
  coaps+tcp://HOST:PORT   CoAP over TLS, with the certificate and key in tls.pem
                          in the directory of the blocks, made if need be
  coap+ws://HOST:PORT     CoAP over WebSockets, at the path /.well-known/coap
  coap://HOST:PORT        CoAP over UDP
  coap+unix:///PATH       CoAP over a further Unix socket
  http://HOST:PORT        HTTP, at the path /uri-res/N2R

Whoever can connect may get blocks. What the store does not have comes from the
stores that --upstream names, if the client is on a Unix socket, or the URL says
"?relay"; it is kept. With --relay, it also comes from machines that have
connected, by --peer, for example, and for all clients but those by coap://,
whose URL must say "?relay". To put blocks is permitted on Unix sockets,
and elsewhere only if the URL says so: "coap+tcp://[::1]:5683?get&put".`,
		Args: message.NoArguments,
	}
	f := c.Flags()
	f.StringVar(&s.directory, "directory", "", "keep the blocks in `DIRECTORY` (default: /var/cache/guix-substitute-eris/blocks, or below the cache of a user)")
	f.StringVar(&s.socket, "socket", "", "listen on the Unix socket `PATH`; \"none\" is none (default: /run/guix-substitute-eris/eris.sock, or $XDG_RUNTIME_DIR/eris.sock of a user)")
	f.StringVar(&s.socketMode, "socket-mode", "660", "who may write to Unix sockets, and thus put blocks, is said by the octal `MODE`")
	f.StringVar(&s.socketGroup, "socket-group", "", "these sockets belong to `GROUP`")
	f.StringArrayVar(&s.listen, "listen", nil, "listen at `URL` too; may be given several times")
	f.StringArrayVar(&s.upstreams, "upstream", nil, "get what is not here from the store at `URL`, and keep it; may be given several times")
	f.StringArrayVar(&s.peers, "peer", nil, "connect to the server at `URL` and give it blocks over that connection, if it asks (--relay); may be given several times")
	f.BoolVar(&s.relay, "relay", false, "get what is not here from the machines that are connected (--peer), for clients by every URL but coap://, and keep it")
	s.user.flag(c)
	s.log.flags(c)
	f.StringVar(&s.status, "status", "", "show the status to browsers and to monitoring of this machine, over HTTP at `ADDRESS`, 127.0.0.1:8183 for instance")
	f.Func("max-size", "keep blocks of at most `SIZE` in all, like 20GiB; the least recently used go (default: no limit)", func(text string) error {
		err := bytesize.Set(&s.maxSize, bytesize.Parse)(text)
		if err == nil && s.maxSize < blockstore.MinBytes {
			err = errors.New("it is less than 1MiB")
		}
		return err
	})
	f.BoolVar(&s.items, "items", false, "serve the blocks of the store items of this machine too, which are made from their files")
	s.itemSettings.flags(f)
	f.Func("limit-rate", "send at most `RATE` bytes per second in all, like 2MiB, and get at most so many of blocks from upstreams (default: no limit)", bytesize.Set(&s.limitRate, bytesize.ParseRate))
	s.maxConnections = mostConnections
	numberFlag(f, &s.maxConnections, "max-connections", "have at most `NUMBER` connections per --listen and --socket at a time, of which one host may have half")
	f.BoolVar(&s.advertise, "advertise", false, "be found on the local network; without --listen, listen at coap+tcp://[::]:5683")
	f.BoolVar(&s.stats, "stats", false, "print the statistics of the server that listens on the socket, as metrics of Prometheus, and do nothing else")
	c.RunE = func(*cobra.Command, []string) error {
		if s.stats {
			_, sections, err := s.askStatistics()
			if err == nil {
				_, err = fmt.Print(status.Metrics(sections))
			}
			return err
		}
		if err := errors.Join(s.user.check(c.Name()), s.log.open()); err != nil {
			return err
		}
		if !s.items && s.manifest+s.narinfos+s.root != "" {
			return message.Usage("--manifest, --narinfos and --root say which store items there are; they are shared with --items")
		}
		return s.user.explain(s.run(c.Context()))
	}
	return c
}

// mostConnections is how many connections a server has at most, unless --max-connections says so.
const mostConnections = 256

// numberFlag defines an option that is a decimal number of at least 1.
func numberFlag(f *pflag.FlagSet, value *int, name, usage string) {
	f.Func(name, usage, func(text string) error {
		n, err := strconv.ParseUint(text, 10, 31)
		if err != nil || n < 1 {
			return errors.New("it must be a number of at least 1")
		}
		*value = int(n)
		return nil
	})
	f.Lookup(name).DefValue = strconv.Itoa(*value)
}

// run serves until a signal comes or something fails for good.
func (s *serveSettings) run(ctx context.Context) (err error) {
	passed, err := systemd.Sockets()
	if err != nil {
		return err
	}
	var endpoints []*endpoint
	defer func() {
		for _, e := range endpoints {
			e.close()
		}
	}()
	for _, socket := range passed {
		e, err := passedEndpoint(socket)
		if err != nil {
			return err
		}
		endpoints = append(endpoints, &e)
	}
	own, err := s.endpoints(endpoints)
	if err != nil {
		return err
	}
	if u, err := s.user.lookUp(); err == nil && u != nil { // the server will be of that group
		s.socketGroup = cmp.Or(s.socketGroup, u.Gid)
	}
	rights, err := parseSocketRights(s.socketMode, s.socketGroup)
	if err != nil {
		return err
	}
	for _, e := range own {
		if err := e.listen(rights); err != nil {
			return err
		}
		endpoints = append(endpoints, e)
	}
	if s.status != "" {
		if s.statusListener, err = listenStatus(s.status); err != nil {
			return err
		}
		defer s.statusListener.Close()
	}
	if err := s.user.become(); err != nil {
		return err
	}
	if s.directory == "" {
		if s.directory, err = settings.CacheDirectory("blocks"); err != nil {
			return fmt.Errorf("%w; name a directory by --directory", err)
		}
	}
	store, err := s.openShared(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	defer s.close()
	if s.advertise {
		if s.advertised, err = advertisedPort(endpoints); err != nil {
			return err
		}
	}
	s.sending = ratelimit.New(s.limitRate, 0)
	for _, e := range endpoints {
		e.limit(s.sending)
		if err := e.secure(s.directory); err != nil {
			return err
		}
	}
	peers, err := s.openPeers()
	if err != nil {
		return err
	}
	connected := s.newGroup(endpoints)
	from, err := s.openUpstreams(store, connected)
	if err != nil {
		return err
	}
	if from != nil {
		defer func() { err = errors.Join(err, from.Close()) }()
	}
	return s.serveEndpoints(ctx, store, from, peers, endpoints)
}

// endpoints returns where to listen, given what is listened on already.
func (s *serveSettings) endpoints(passed []*endpoint) ([]*endpoint, error) {
	var endpoints []*endpoint
	onSocket := func(e *endpoint) bool { return e.scheme == "coap+unix" }
	if s.socket != "none" && (s.socket != "" || !slices.ContainsFunc(passed, onSocket)) {
		path, err := s.socketPath()
		if err != nil {
			return nil, err
		}
		endpoints = append(endpoints, &endpoint{scheme: "coap+unix", address: path, relay: true, Access: coapserver.Access{Get: true, Put: true}})
	}
	listen := s.listen
	if s.advertise && len(listen) == 0 {
		listen = []string{"coap+tcp://[::]:5683"}
	}
	for _, url := range listen {
		e, err := parseEndpoint(url)
		if err != nil {
			return nil, err
		}
		endpoints = append(endpoints, &e)
	}
	if len(endpoints)+len(passed)+len(s.peers) == 0 {
		return nil, message.Usage("there is nothing to listen on; name something by --socket or --listen")
	}
	return endpoints, nil
}

// socketPath returns the absolute path of the socket.
func (s *serveSettings) socketPath() (string, error) {
	if strings.Contains(s.socket, "://") {
		return "", message.Usage("--socket=%s: it must be the path of a socket, and not a URL", s.socket)
	}
	if s.socket != "" {
		return filepath.Abs(s.socket)
	}
	return settings.DefaultSocket(os.Geteuid(), os.Getenv("XDG_RUNTIME_DIR"))
}

// openUpstreams returns what gets blocks from elsewhere, also from those who are connected unless
// that is nil; nil if there is nowhere.
func (s *serveSettings) openUpstreams(store sharing, connected *peers.Group) (*relay.Relay, error) {
	if len(s.upstreams) == 0 && connected == nil {
		return nil, nil
	}
	if len(s.upstreams) > maxUpstreams {
		return nil, message.Usage("--upstream: there may be %d at most", maxUpstreams)
	}
	levels := 0
	if connected != nil {
		levels = 1 // upstreams may not ask theirs: peers are never asked for a relay of peers
	}
	return relay.New(store, relay.Options{
		Levels: levels,
		Open:   func(hops int) ([]pool.Member, error) { return s.openMembers(connected, hops) },
		Pool: pool.Options{
			State: sourcestate.Open(filepath.Join(s.directory, "upstreams")), Limiter: ratelimit.New(s.limitRate, 0),
			OnFault: func(source string, err error) {
				s.log.Error("upstream gave wrong bytes and is not asked again:", "url", source, "error", message.OfStore(source, err))
			},
			OnRest: func(source string, err error) {
				s.log.Warn("upstream is left alone for a while:", "url", source, "error", message.OfStore(source, err))
			},
		},
	})
}

// openStore opens the block store. If its index is damaged, it is made anew.
func (s *serveSettings) openStore(ctx context.Context) (*blockstore.Store, error) {
	options := blockstore.Options{MaxBytes: s.maxSize}
	store, err := blockstore.Open(s.directory, options)
	if errors.Is(err, blockstore.ErrDamaged) {
		s.log.Warn(err.Error() + "; making it anew from the blocks")
		var blocks int64
		if blocks, err = blockstore.Rebuild(ctx, s.directory); err != nil {
			return nil, err
		}
		s.log.Info("the index is whole again", "blocks", blocks)
		store, err = blockstore.Open(s.directory, options)
	}
	return store, err
}

// serveEndpoints serves the store on all endpoints until ctx is done, one of them fails, or the
// store takes no more blocks. From then on, further signals end the program at once.
func (s *serveSettings) serveEndpoints(ctx context.Context, store sharing, from *relay.Relay, peers []*coap.Store, endpoints []*endpoint) (err error) {
	web := httpserver.New(httpserver.Config{
		Source: store, Sink: store.Put, MaxConnections: s.maxConnections, Log: s.log.WarnError, Wrap: s.log.requests,
	})
	started := time.Now()
	var blocks *coapserver.Server
	collect := func() []status.Section { return s.sections(started, store, from, blocks, web) }
	blocks = coapserver.New(coapserver.Config{
		Source:         store,
		Sink:           store,
		Document:       coapserver.Document{Path: []string{statisticsPath}, Format: coapmessage.AppOctets, Text: func() []byte { return packed(collect()) }},
		MaxConnections: s.maxConnections,
		Log:            s.log.WarnError,
		Requested:      s.log.blocks(),
	})
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, len(endpoints)+1)
	var group sync.WaitGroup
	for _, e := range endpoints {
		e.Document = e.scheme == "coap+unix"
		if e.relay && from != nil {
			e.Relay = func(client string, hops int) fetch.Source { return from.For(client, hops) }
		}
		group.Go(func() {
			var err error
			switch {
			case e.packets != nil:
				err = blocks.ServePacket(e.packets, e.Access)
			case e.scheme == "coap+ws":
				err = blocks.ServeWebSocket(e.listener, e.Access)
			case e.scheme == "http":
				err = web.Serve(ctx, e.listener, httpserver.Access{Get: e.Get, Put: e.Put, Relay: e.Relay, Hosts: e.Hosts})
			default:
				err = blocks.Serve(e.listener, e.Access)
			}
			if err != nil {
				failed <- fmt.Errorf("serving on %v: %w", e, err)
			}
		})
		url, access := e.describe()
		s.log.Info("serving on", "url", url, "access", access)
	}
	if s.advertised != 0 {
		group.Go(func() { s.log.advertise(ctx, lan.Blocks, s.advertised) })
	}
	if s.statusListener != nil {
		page := &status.Server{
			Title: "Block store", Collect: collect, Healthy: store.Err, Warnings: s.log.Warnings,
		}
		s.log.Info("status at", "url", "http://"+s.statusListener.Addr().String())
		group.Go(func() {
			if err := serveStatus(ctx, s.statusListener, page); err != nil {
				failed <- err
			}
		})
	}
	for _, p := range peers {
		group.Go(func() { s.servePeer(ctx, p, blocks) })
	}
	s.log.notify("READY=1")
	check := time.NewTicker(checkPeriod)
	defer check.Stop()
	for err == nil && ctx.Err() == nil {
		select {
		case <-check.C:
			// A service manager starts the server again, and then the index is read, or made, anew.
			err = store.Err()
		case <-ctx.Done():
		case err = <-failed:
		}
	}
	if err == nil {
		s.log.Info("stopping")
	}
	s.log.notify("STOPPING=1")
	stop()
	store.Interrupt()
	graceful, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	// What was acknowledged is durable already; clients that do not go are cut off.
	_ = blocks.Shutdown(graceful)
	group.Wait()
	web.Close()
	return err
}
