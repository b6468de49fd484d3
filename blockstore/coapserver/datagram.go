// SPDX-License-Identifier: GPL-3.0-or-later

package coapserver

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/admission"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/coap"
)

const (
	// answerTimeout is more than all copies of an answer take with the default timeouts (RFC 7252,
	// section 4.8.2).
	answerTimeout = 2 * time.Minute
	// maxTransfers is the most blocks at a time that are being received part by part, and
	// maxTransfersPerHost that from one host. The oldest make room. Each needs 32 KiB.
	maxTransfers, maxTransfersPerHost = 1024, 256
	// requestBuffer is how many bytes the kernel shall keep of requests: more than a thousand.
	requestBuffer = 1 << 20
	// transferTimeout is for how long the parts of a block are kept without a further one.
	transferTimeout = 30 * time.Second
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
// Mind that the sender of a datagram can be forged, and that an answer is up to 17 times as
// long as its request: who can reach the socket can have that much sent to somebody else. Serve UDP
// only where that is no harm, on a local network. If the socket is bound to no address in
// particular, see [AnswerFromThere].
func (s *Server) ServePacket(conn net.PacketConn, access Access) error {
	defer conn.Close()
	if !s.begin() {
		return nil
	}
	defer s.services.Done()
	// What is being served can still be answered.
	defer context.AfterFunc(s.stopping, func() { conn.SetReadDeadline(time.Unix(1, 0)) })()
	defer context.AfterFunc(s.ctx, func() { conn.Close() })()
	if socket, ok := conn.(interface{ SetReadBuffer(bytes int) error }); ok {
		_ = socket.SetReadBuffer(requestBuffer) // as far as the system allows
	}
	config := s.config.Datagram
	p := &packets{server: s, access: access, transfers: newTransfers(maxTransfers, maxTransfersPerHost, transferTimeout)}
	config.Timeout, config.Paths, config.Handler = answerTimeout, s.paths, p.serve
	err := coap.NewEndpoint(conn, config).Run()
	if s.stopping.Err() != nil {
		return nil
	}
	return err
}

// AnswerFromThere returns a socket whose answers come from the address that was asked: clients wait
// for nothing else. Left to itself, the kernel chooses one of those of the machine, of which there
// are several wherever IPv6 is.
func AnswerFromThere(conn net.PacketConn) net.PacketConn {
	socket, ok := conn.(*net.UDPConn)
	if !ok || !socket.LocalAddr().(*net.UDPAddr).IP.IsUnspecified() {
		return conn // which has one address
	}
	if ipv6.NewPacketConn(socket).SetControlMessage(ipv6.FlagDst, true) != nil && ipv4.NewPacketConn(socket).SetControlMessage(ipv4.FlagDst, true) != nil {
		return conn
	}
	return fromThere{socket}
}

type fromThere struct{ *net.UDPConn }

// asker is the address of a client, and the one that it has asked, as the kernel says it: given
// back to the kernel, the same words say from where an answer is to come (ip(7), ipv6(7)).
type asker struct {
	*net.UDPAddr
	asked []byte
}

// ReadFrom implements net.PacketConn.
func (c fromThere) ReadFrom(b []byte) (int, net.Addr, error) {
	var control [128]byte
	n, m, _, from, err := c.ReadMsgUDP(b, control[:])
	return n, asker{from, slices.Clone(control[:m])}, err
}

// WriteTo implements net.PacketConn. The address must come from ReadFrom.
func (c fromThere) WriteTo(b []byte, to net.Addr) (int, error) {
	n, _, err := c.WriteMsgUDP(b, to.(asker).asked, to.(asker).UDPAddr)
	return n, err
}

// datagramForm is how blocks go in datagrams (RFC 7252, section 4.6).
var datagramForm = form{whole: unit, exponent: coap.MaxExponent}

// serve does what a request asks for, and answers.
func (p *packets) serve(packet *coap.Packet) {
	s, r := p.server, &packet.Request
	code := s.check(r, p.access)
	switch {
	case code != codes.Empty:
		packet.Respond(code, nil, nil)
	case r.Resource == haveResource:
		packet.Respond(s.have(r, p.access))
	case r.Block1.Exponent == coap.BERT:
		packet.Respond(codes.BadRequest, nil, nil)
	case r.Code == codes.GET:
		l := s.lookups.Get().(*lookup)
		defer s.lookups.Put(l)
		packet.Respond(s.get(s.ctx, l, s.newGetRequest(r, &p.access, admission.Host(packet.Peer)), datagramForm))
	default:
		code = p.put(packet)
		packet.Respond(code, block1Option(r.Block1, code), nil)
	}
}

// put takes a PUT.
func (p *packets) put(packet *coap.Packet) codes.Code {
	r := &packet.Request
	if !r.Block1.Present {
		return p.store(packet, r.Payload)
	}
	p.mu.Lock()
	t, code := p.transfers.part(packet.Peer, admission.Host(packet.Peer), r)
	if t == nil || code != codes.Created {
		p.mu.Unlock()
		return code
	}
	whole := t.finish()
	p.mu.Unlock()
	code = p.store(packet, whole)
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.complete {
		// The last part may come again, if this answer is lost.
		t.code = code
	}
	return code
}

// store stores a single block.
func (p *packets) store(packet *coap.Packet, block []byte) codes.Code {
	if !eris.BlockSize(len(block)).Valid() {
		return codes.BadRequest
	}
	s, ref := p.server, eris.Sum(block)
	code := s.putCode(s.config.Sink.PutBatch(s.ctx, []eris.Reference{ref}, [][]byte{block}))
	s.requested(admission.Host(packet.Peer), "PUT", ref, code)
	return code
}
