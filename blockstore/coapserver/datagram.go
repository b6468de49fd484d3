// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

// packets serves one net.PacketConn.
type packets struct {
	server *Server
	access Access
	conn   net.PacketConn
	nextID atomic.Uint32

	mu        sync.Mutex
	busy      map[messageKey]struct{}      // requests that are being served
	unacked   map[messageKey]chan struct{} // answers of ours
	transfers map[datagramKey]*datagramTransfer
	hosts     map[string]int // transfers per host
	purged    time.Time
}

// messageKey names a message: they are told apart by endpoint and message ID (RFC 7252, section 4.5).
type messageKey struct {
	peer string
	id   uint16
}

type datagramKey struct {
	peer string
	transferKey
}

type datagramTransfer struct {
	*transfer // nil once it is stored
	host      string
	last      time.Time
	length    int
	code      codes.Code // of the answer to the last part
}

const (
	maxRetransmit = 4
	// maxPacket is the size in bytes of the buffer for a datagram; longer ones are truncated, hence refused.
	maxPacket = coap.MaxDatagramSize + 1
)

// ServePacket serves requests that come in datagrams (RFC 7252), until the socket fails or the server is closed. It closes
// the socket. A block of 1 KiB is one datagram, one of 32 KiB goes in parts. Requests that are lost are asked again by their
// clients.
//
// Mind that the sender of a datagram can be forged, and that an answer is up to twelve times as long as its request: who can
// reach the socket can have that much sent to somebody else. Serve UDP only where that is no harm, on a local network. If the
// socket is bound to no address in particular, answers come from the address that the kernel chooses.
func (s *Server) ServePacket(conn net.PacketConn, access Access) error {
	if !s.begin(conn) {
		conn.Close()
		return ErrServerClosed
	}
	defer s.done(conn)
	p := &packets{
		server:    s,
		access:    access,
		conn:      conn,
		busy:      make(map[messageKey]struct{}),
		unacked:   make(map[messageKey]chan struct{}),
		transfers: make(map[datagramKey]*datagramTransfer),
		hosts:     make(map[string]int),
	}
	var (
		group sync.WaitGroup
		first atomic.Pointer[error]
	)
	for range s.config.Datagram.Workers {
		group.Go(func() {
			err := p.work()
			first.CompareAndSwap(nil, &err)
			conn.Close() // so that the others end as well
		})
	}
	group.Wait()
	if s.isClosing() {
		return ErrServerClosed
	}
	return *first.Load()
}

// work takes datagrams and serves them, one after the other.
func (p *packets) work() error {
	buffer := make([]byte, maxPacket)
	for {
		n, addr, err := p.conn.ReadFrom(buffer)
		if err != nil {
			if errors.Is(err, net.ErrClosed) || p.server.isClosing() {
				return err
			}
			// Mostly an ICMP error about an answer: of no interest.
			select {
			case <-time.After(time.Millisecond):
				continue
			case <-p.server.ctx.Done():
				return err
			}
		}
		if n <= coap.MaxDatagramSize {
			p.packet(buffer[:n], addr)
		}
	}
}

func (p *packets) send(b []byte, addr net.Addr) {
	// What is lost is sent again, or asked again.
	_, _ = p.conn.WriteTo(b, addr)
}

// packet takes one datagram.
func (p *packets) packet(b []byte, addr net.Addr) {
	m, err := coap.ParseDatagram(b)
	if err != nil {
		return
	}
	key := messageKey{addr.String(), m.ID}
	switch {
	case m.Type == message.Acknowledgement || m.Type == message.Reset:
		p.mu.Lock()
		if acked, ok := p.unacked[key]; ok {
			close(acked)
			delete(p.unacked, key)
		}
		p.mu.Unlock()
	case coap.IsRequest(m.Code):
		p.request(m, key, addr)
	case m.Type == message.Confirmable:
		// A ping, or an answer to a question that we did not ask.
		p.send(coap.AppendEmpty(nil, message.Reset, m.ID), addr)
	}
}

// request serves a request. If that takes long, the request is acknowledged meanwhile, and the answer goes apart (RFC 7252,
// section 5.2.2).
func (p *packets) request(m coap.Datagram, key messageKey, addr net.Addr) {
	p.mu.Lock()
	if _, ok := p.busy[key]; ok {
		p.mu.Unlock()
		return
	}
	p.busy[key] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.busy, key)
		p.mu.Unlock()
	}()

	var (
		mu              sync.Mutex
		acked, answered bool
	)
	if m.Type == message.Confirmable {
		timer := time.AfterFunc(p.server.config.Datagram.AckDelay, func() {
			mu.Lock()
			defer mu.Unlock()
			if !answered {
				acked = true
				p.send(coap.AppendEmpty(nil, message.Acknowledgement, m.ID), addr)
			}
		})
		defer timer.Stop()
	}
	memory := p.server.parts.Get().(*[eris.BlockSize32KiB]byte)
	defer p.server.parts.Put(memory)
	code, options, payload := p.serve(m, key.peer, memory[:0])

	mu.Lock()
	answered = true
	apart := acked || m.Type == message.NonConfirmable
	mu.Unlock()
	kind, id := message.Acknowledgement, m.ID
	if apart {
		id = uint16(p.nextID.Add(1))
		kind = message.NonConfirmable
		if acked {
			kind = message.Confirmable
		}
	}
	b := make([]byte, 0, coap.MaxDatagramSize)
	b = coap.AppendDatagramHead(b, kind, code, id, m.Token)
	b = append(b, options...)
	if len(payload) > 0 {
		b = append(append(b, 0xff), payload...)
	}
	if kind == message.Confirmable {
		p.sendUntilAcked(b, messageKey{key.peer, id}, addr)
		return
	}
	p.send(b, addr)
}

// sendUntilAcked sends an answer until it is acknowledged (RFC 7252, section 4.2).
func (p *packets) sendUntilAcked(b []byte, key messageKey, addr net.Addr) {
	acked := make(chan struct{})
	p.mu.Lock()
	p.unacked[key] = acked
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		if p.unacked[key] == acked {
			delete(p.unacked, key)
		}
		p.mu.Unlock()
	}()
	wait := p.server.config.Datagram.AckTimeout
	for range 1 + maxRetransmit {
		p.send(b, addr)
		timer := time.NewTimer(wait)
		select {
		case <-acked:
			timer.Stop()
			return
		case <-p.server.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		wait *= 2
	}
}

// serve does what a request asks for and returns the answer. The memory has room for a block.
func (p *packets) serve(m coap.Datagram, peer string, memory []byte) (code codes.Code, options, payload []byte) {
	s := p.server
	var r coap.Request
	if code := s.paths.ParseRequest(m.Body, &r); code != codes.Empty {
		return code, nil, nil
	}
	if r.Resource < 0 || r.Resource >= len(s.resources) {
		return codes.NotFound, nil, nil
	}
	resource := &s.resources[r.Resource]
	if r.Block1.Exponent == coap.BERT || r.Block2.Exponent == coap.BERT {
		return codes.BadRequest, nil, nil
	}
	switch {
	case m.Code == codes.GET && p.access.Get && resource.Blocks != nil:
		if !r.HasReference || r.BadSize {
			return codes.BadRequest, nil, nil
		}
		block, code := s.get(s.ctx, getRequest{r.Reference, r.Size, m.Token, r.Block2, uint8(r.Resource)}, memory)
		if code != codes.Content {
			return code, nil, nil
		}
		asked := r.Block2
		if !asked.Present && len(block) > maxPart {
			asked = coap.Block{Exponent: coap.MaxExponent, Present: true}
		}
		options, payload, code = part(block, asked, asked.Unit())
		return code, options, payload
	case (m.Code == codes.PUT || m.Code == codes.POST) && p.access.Put && resource.Sink != nil:
		code := p.put(&r, peer)
		if r.Block1.Present {
			if code == codes.RequestEntityTooLarge {
				r.Block1.More = false
			}
			options = coap.AppendUintOption(nil, 0, message.Block1, r.Block1.Uint())
		}
		return code, options, nil
	}
	return codes.MethodNotAllowed, nil, nil
}

// maxPart is the greatest payload in bytes of a datagram (RFC 7252, section 4.6).
const maxPart = 1024

// put takes a PUT.
func (p *packets) put(r *coap.Request, peer string) codes.Code {
	if !r.Block1.Present {
		if !eris.BlockSize(len(r.Payload)).Valid() {
			return codes.BadRequest
		}
		return p.server.storeOne(p.server.ctx, r.Resource, r.Payload)
	}
	key := datagramKey{peer, transferKey{r.Resource, r.Tag}}
	p.mu.Lock()
	t, code := p.transferPart(key, r)
	p.mu.Unlock()
	if code != codes.Created || t == nil {
		return code
	}
	// Nobody else has the memory now.
	whole := t.memory[:t.have]
	code = codes.BadRequest
	if eris.BlockSize(len(whole)).Valid() {
		code = p.server.storeOne(p.server.ctx, r.Resource, whole)
	}
	p.mu.Lock()
	if stored := p.transfers[key]; stored != nil && stored.transfer == nil {
		// The last part may come again, if this answer is lost.
		stored.code = code
	}
	p.mu.Unlock()
	return code
}

// transferPart takes a part of a block. It returns the transfer with the code 2.01 if it is complete. The lock must be held.
func (p *packets) transferPart(key datagramKey, r *coap.Request) (*transfer, codes.Code) {
	now := time.Now()
	p.purge(now)
	t := p.transfers[key]
	switch {
	case t != nil && t.transfer != nil:
	case t != nil && r.Block1.Number != 0:
		if !r.Block1.More && r.Block1.Offset()+len(r.Payload) == t.length {
			return nil, t.code
		}
		return nil, codes.RequestEntityIncomplete
	case r.Block1.Number != 0:
		return nil, codes.RequestEntityIncomplete
	case t != nil:
		t.transfer = new(transfer)
	default:
		t = p.addTransfer(key)
	}
	t.last = now
	dst, code := t.part(r, len(r.Payload))
	copy(dst, r.Payload)
	if code != codes.Created {
		return nil, code
	}
	whole := t.transfer
	t.transfer, t.length, t.code = nil, whole.have, codes.ServiceUnavailable
	return whole, code
}

// addTransfer adds a transfer; if there are too many, the one goes that has waited longest, of the same host if that has too
// many. The lock must be held.
func (p *packets) addTransfer(key datagramKey) *datagramTransfer {
	host := key.peer
	if addr, err := netip.ParseAddrPort(key.peer); err == nil {
		host = addr.Addr().String()
	}
	limits := &p.server.config.Datagram
	if crowded := p.hosts[host] >= limits.MaxTransfersPerHost; crowded || len(p.transfers) >= limits.MaxTransfers {
		var oldest datagramKey
		var last time.Time
		for k, t := range p.transfers {
			if (!crowded || t.host == host) && (last.IsZero() || t.last.Before(last)) {
				oldest, last = k, t.last
			}
		}
		p.removeTransfer(oldest)
	}
	t := &datagramTransfer{transfer: new(transfer), host: host}
	p.transfers[key] = t
	p.hosts[host]++
	return t
}

func (p *packets) removeTransfer(key datagramKey) {
	host := p.transfers[key].host
	delete(p.transfers, key)
	if p.hosts[host]--; p.hosts[host] == 0 {
		delete(p.hosts, host)
	}
}

// purge drops transfers that do not go on. The lock must be held.
func (p *packets) purge(now time.Time) {
	timeout := p.server.config.Datagram.TransferTimeout
	if now.Sub(p.purged) < timeout/16 {
		return
	}
	p.purged = now
	for key, t := range p.transfers {
		if now.Sub(t.last) > timeout {
			p.removeTransfer(key)
		}
	}
}

// storeOne stores a single block.
func (s *Server) storeOne(ctx context.Context, resource int, block []byte) codes.Code {
	return s.putCode(s.resources[resource].Sink.Put(ctx, eris.Sum(block), block))
}
