// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	wire "codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// stream carries requests over a connection that is made when it is needed, and made again when it has failed.
type stream struct {
	store   *Store
	pool    *sync.Pool
	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	group   sync.WaitGroup
	present atomic.Pointer[session]
	inParts atomic.Bool // the peer has answered in parts

	mu      sync.Mutex
	closed  bool
	dialing *dialing
	backoff backoff
}

// dialing is an attempt to make a connection, which all callers wait for.
type dialing struct {
	done    chan struct{}
	session *session
	err     error
}

func newStream(store *Store) *stream {
	s := &stream{store: store, pool: wire.NewPool(), backoff: backoff{first: store.options.firstBackoff}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

func (s *stream) close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	if session := s.present.Load(); session != nil {
		session.release(errClosed)
	}
	s.group.Wait()
	return nil
}

// session returns a connection that takes requests. It waits for one to be made.
func (s *stream) session(ctx context.Context) (*session, error) {
	for {
		if present := s.present.Load(); present != nil {
			if usable, _ := present.usable(); usable {
				return present, nil
			}
		}
		d, err := s.dial()
		if err != nil {
			return nil, err
		}
		if d == nil {
			continue
		}
		select {
		case <-d.done:
			return d.session, d.err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// dial joins the attempt to make a connection, or begins one. It returns neither if there is a connection already.
func (s *stream) dial() (*dialing, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if s.dialing != nil {
		return s.dialing, nil
	}
	if present := s.present.Load(); present != nil {
		usable, proven := present.usable()
		if usable {
			return nil, nil
		}
		s.present.Store(nil)
		if proven {
			s.backoff.worked()
		} else {
			s.backoff.failed(present.cause())
		}
	}
	wait, err := s.backoff.wait()
	if err != nil {
		return nil, err
	}
	d := &dialing{done: make(chan struct{})}
	s.dialing = d
	s.group.Go(func() { s.finishDial(d, wait) })
	return d, nil
}

// finishDial makes a connection and then serves it.
func (s *stream) finishDial(d *dialing, wait time.Duration) {
	conn, err := s.connect(wait)
	s.mu.Lock()
	s.dialing = nil
	if s.closed && err == nil {
		conn.Close()
		err = errClosed
	}
	if err != nil {
		d.err = err
		if !s.closed {
			s.backoff.failed(err)
		}
	} else {
		d.session = newSession(conn, s.store.requests, s.pool, &s.store.options)
		s.present.Store(d.session)
	}
	close(d.done)
	s.mu.Unlock()
	if d.session != nil {
		d.session.run()
	}
	if socket, ok := conn.(*wire.WebSocket); ok {
		socket.Wait()
	}
}

func (s *stream) connect(wait time.Duration) (net.Conn, error) {
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-s.ctx.Done():
			return nil, errClosed
		}
	}
	options := &s.store.options
	ctx, cancel := context.WithTimeout(s.ctx, options.DialTimeout)
	defer cancel()
	conn, err := s.open(ctx)
	if err != nil {
		if s.ctx.Err() != nil {
			return nil, errClosed
		}
		return nil, fmt.Errorf("connecting: %w", err)
	}
	return conn, nil
}

const unixSocketBuffer = 1 << 20

func (s *stream) open(ctx context.Context) (net.Conn, error) {
	options := &s.store.options
	if options.Dial != nil {
		return options.Dial(ctx)
	}
	network, address := s.store.url.Address()
	buffer := options.SocketBuffer
	if network == "unix" && buffer == 0 {
		buffer = unixSocketBuffer
	}
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		if buffer > 0 {
			// Before the connection is made, because TCP agrees on the scale of its window then.
			raw.Control(func(fd uintptr) { wire.SetSocketBuffers(fd, buffer) })
		}
		return nil
	}}
	config := &tls.Config{InsecureSkipVerify: true}
	if options.TLS != nil {
		config = options.TLS.Clone()
	}
	if s.store.url.WebSocket() {
		return openWebSocket(ctx, s.store.url, &dialer, config)
	}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil || !s.store.url.TLS() {
		return conn, err
	}
	if config.ServerName == "" {
		config.ServerName = s.store.url.Host
	}
	if config.NextProtos == nil {
		config.NextProtos = []string{"coap"} // RFC 8323, section 8.2
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return secure, nil
}

// cause returns why the session has ended.
func (s *session) cause() error {
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	if s.err == nil {
		return errReleased
	}
	return s.err
}

func (s *stream) get(ctx context.Context, c *call) (length int, err error) {
	dst := c.dst
	for attempt := 0; ; attempt++ {
		c.dst = dst
		var session *session
		if session, err = s.session(ctx); err != nil {
			return 0, err
		}
		if length, err = session.get(ctx, c); err == nil {
			return length, nil
		}
		if attempt > 0 || !session.again(err) {
			return 0, err
		}
	}
}

func (s *stream) put(ctx context.Context, c *call) (err error) {
	block := c.payload
	for attempt := 0; ; attempt++ {
		c.payload = block
		var session *session
		if session, err = s.session(ctx); err != nil {
			return err
		}
		if err = session.put(ctx, c); err == nil {
			return nil
		}
		if attempt > 0 || !session.again(err) {
			return err
		}
	}
}

// again reports whether a call that has failed should be tried once more, on a new connection: if it was the connection that
// failed. It may have died unnoticed while nobody used it; but a peer that has never answered is not asked twice.
func (s *session) again(err error) bool {
	var failure *sessionError
	if !errors.As(err, &failure) {
		return false
	}
	_, proven := s.usable()
	return proven || !errors.Is(err, errSilent)
}

// get gets a block in one message, or in parts if the peer answers so.
func (s *session) get(ctx context.Context, c *call) (int, error) {
	dst := c.dst
	c.block = wire.Block{}
	if err := s.do(ctx, c); err != nil {
		return 0, err
	}
	if err := getError(c); err != nil {
		return 0, err
	}
	if !c.response.Block2.Present {
		return c.length, nil
	}
	ctx, cancel := s.options.forParts(ctx)
	defer cancel()
	return getParts(ctx, s, c, dst)
}

// put puts a block in one message, or in parts if the peer cannot take it otherwise.
func (s *session) put(ctx context.Context, c *call) error {
	block := c.payload
	c.block, c.total = wire.Block{}, 0
	capabilities := wire.Capabilities{MessageSize: wire.BaseMessageSize}
	size := s.requests.PutSize(wire.Block{}, 0, len(block)) + wire.MaxHeadSize
	if size > wire.BaseMessageSize {
		var err error
		if capabilities, err = s.peer(ctx); err != nil {
			return err
		}
	}
	silent := !capabilities.Stated && !capabilities.BlockWise
	whole := size <= int(capabilities.MessageSize) || silent && !s.options.StrictMessageSize
	if !whole && !capabilities.BlockWise {
		return fmt.Errorf("peer takes messages of %d bytes only", capabilities.MessageSize)
	}
	if whole {
		if err := s.do(ctx, c); err != nil {
			return err
		}
		if c.code != codes.RequestEntityTooLarge || len(block) <= blockUnit || !capabilities.BlockWise {
			return putError(c)
		}
	}
	return s.putParts(ctx, c, block, capabilities)
}

// putParts puts a block part by part, after those that others put so.
func (s *session) putParts(ctx context.Context, c *call, block []byte, capabilities wire.Capabilities) error {
	select {
	case <-s.inParts:
		defer func() { s.inParts <- struct{}{} }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	ctx, cancel := s.options.forParts(ctx)
	defer cancel()
	if capabilities.BERT() {
		overhead := s.requests.PutSize(wire.Block{Number: 1 << 12, Present: true}, len(block), 0) + wire.MaxHeadSize
		if units := (int(min(capabilities.MessageSize, wire.MessageSize)) - overhead) / blockUnit; units > 1 {
			return putParts(ctx, s, c, block, wire.BERT, units*blockUnit)
		}
	}
	return putParts(ctx, s, c, block, wire.MaxExponent, blockUnit)
}

// peer returns what the peer can receive. It waits for a while until the peer has said so.
func (s *session) peer(ctx context.Context) (wire.Capabilities, error) {
	select {
	case <-s.introduced:
	default:
		timer := time.NewTimer(s.options.CapabilityTimeout)
		defer timer.Stop()
		select {
		case <-s.introduced:
		case <-timer.C:
		case <-ctx.Done():
			return wire.Capabilities{}, context.Cause(ctx)
		}
	}
	s.queue.Mu.Lock()
	defer s.queue.Mu.Unlock()
	return s.capabilities, nil
}
