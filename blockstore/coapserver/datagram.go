// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	maxRetransmit = 4
	// maxPart is the greatest payload in bytes of a datagram (RFC 7252, section 4.6).
	maxPart = 1024
	// answerTimeout is more than all copies of an answer take with the default timeouts (RFC 7252,
	// section 4.8.2).
	answerTimeout = 2 * time.Minute
)

// packets serves one net.PacketConn.
type packets struct {
	server *Server
	access Access

	mu        sync.Mutex
	transfers *transfers
}

// ServePacket serves requests that come in datagrams (RFC 7252), until the socket fails or the
// server is closed. It closes the socket. A block of 1 KiB is one datagram, one of 32 KiB goes in
// parts. Requests that are lost are sent again by their clients.
//
// Mind that the sender of a datagram can be forged, and that an answer is up to twelve times as
// long as its request: who can reach the socket can have that much sent to somebody else. Serve UDP
// only where that is no harm, on a local network. If the socket is bound to no address in
// particular, answers come from the address that the kernel chooses.
func (s *Server) ServePacket(conn net.PacketConn, access Access) error {
	if !s.begin(conn) {
		conn.Close()
		return ErrServerClosed
	}
	defer s.done(conn)
	d := &s.config.Datagram
	p := &packets{server: s, access: access, transfers: newTransfers(d.MaxTransfers, d.MaxTransfersPerHost, d.TransferTimeout)}
	err := coap.NewEndpoint(conn, false, coap.EndpointConfig{
		Window: 1, AckTimeout: d.AckTimeout, MaxRetransmit: maxRetransmit, Timeout: answerTimeout,
		AckDelay: d.AckDelay, Paths: s.paths, Handler: p.serve,
	}).Run(d.Workers)
	if s.isClosing() {
		return ErrServerClosed
	}
	return err
}

// serve does what a request asks for, and answers.
func (p *packets) serve(packet *coap.Packet) {
	memory := p.server.parts.Get().(*[eris.BlockSize32KiB]byte)
	defer p.server.parts.Put(memory)
	packet.Respond(p.answer(packet, memory[:0]))
}

// answer does what a request asks for and returns the answer. The memory has room for a block.
func (p *packets) answer(packet *coap.Packet, memory []byte) (code codes.Code, options, payload []byte) {
	s, r := p.server, &packet.Request
	switch {
	case r.Refuse != codes.Empty:
		return r.Refuse, nil, nil
	case r.Resource < 0 || r.Resource >= len(s.resources):
		return codes.NotFound, nil, nil
	case r.Block1.Exponent == coap.BERT || r.Block2.Exponent == coap.BERT:
		return codes.BadRequest, nil, nil
	}
	resource := &s.resources[r.Resource]
	switch {
	case r.Code == codes.GET && p.access.Get && resource.Source != nil:
		if !r.HasReference || r.BadSize {
			return codes.BadRequest, nil, nil
		}
		block, code := s.get(s.ctx, newGetRequest(r), memory)
		if code != codes.Content {
			return code, nil, nil
		}
		part := r.Block2
		if !part.Present && len(block) > maxPart {
			part = coap.Block{Exponent: coap.MaxExponent, Present: true}
		}
		options, payload, code = cutBlock(block, part, part.Unit())
		return code, options, payload
	case (r.Code == codes.PUT || r.Code == codes.POST) && p.access.Put && resource.Sink != nil:
		code := p.put(packet)
		if r.Block1.Present {
			if code == codes.RequestEntityTooLarge {
				r.Block1.More = false
			}
			options = r.Block1.AppendOption(nil, 0, message.Block1)
		}
		return code, options, nil
	}
	return codes.MethodNotAllowed, nil, nil
}

// put takes a PUT.
func (p *packets) put(packet *coap.Packet) codes.Code {
	r := &packet.Request
	if !r.Block1.Present {
		return p.store(r.Resource, r.Payload)
	}
	host := packet.Peer
	if addr, err := netip.ParseAddrPort(packet.Peer); err == nil {
		host = addr.Addr().String()
	}
	p.mu.Lock()
	t, dst, code := p.transfers.part(packet.Peer, host, r, len(r.Payload))
	copy(dst, r.Payload)
	if t == nil || code != codes.Created {
		p.mu.Unlock()
		return code
	}
	whole := t.finish()
	p.mu.Unlock()
	code = p.store(r.Resource, whole)
	p.mu.Lock()
	if t.complete {
		// The last part may come again, if this answer is lost.
		t.code = code
	}
	p.mu.Unlock()
	return code
}

// store stores a single block.
func (p *packets) store(resource int, block []byte) codes.Code {
	if !eris.BlockSize(len(block)).Valid() {
		return codes.BadRequest
	}
	s := p.server
	return s.putCode(s.resources[resource].Sink.Put(s.ctx, eris.Sum(block), block))
}
