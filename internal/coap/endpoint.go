// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

const (
	// ackRandomFactor stretches the first wait for an answer by up to this factor, at random (RFC
	// 7252, section 4.8).
	ackRandomFactor = 1.5
	// leastTimeout is the shortest first wait, however fast the peer has been so far.
	leastTimeout = 200 * time.Millisecond
	// mostDoubled is how far waits for answers are doubled: whoever wants a block asks elsewhere
	// after some seconds without a word, and where many datagrams are lost, later copies would not
	// have been sent by then.
	mostDoubled = time.Second
	// mostEarly is how many copies of a request are sent because later ones have been answered. More
	// would not help where the peer takes its time for this one.
	mostEarly = 3
	// datagramTokenSize makes it hard to forge answers (RFC 7252, section 5.3.1): tokens start
	// anywhere.
	datagramTokenSize = 4
	// firstWindow is how many exchanges may be under way before anything is known about the
	// network, and at least: where much is lost, the only one would mostly wait to be sent again.
	firstWindow = 4
	// mostQueued is how many exchanges more may be under way than the line carries, which wait in
	// queues: the kernel keeps about 90 datagrams for a socket that is not read, by default.
	mostQueued = 64
	// Round trips of which all are longer by an eighth, within these bounds, tell of a queue (RFC
	// 9406, section 4.2).
	leastDelay, mostDelay = 4 * time.Millisecond, 16 * time.Millisecond
	// messagesPerSocket is how many requests for blocks begin on a socket: servers may take a message
	// for a copy whose ID came from the same address within 247 s (RFC 7252, section 4.4). As many
	// IDs are left for what waits then, and for parts of what has begun.
	messagesPerSocket = 1 << 15
	// typicalRequest is more bytes than most requests have beside the payload.
	typicalRequest = 128
	// mostRandom is the share of messages that may be lost without a queue before that counts as
	// congestion, and lossMemory how many messages the share is about.
	mostRandom, lossMemory = 1. / 8, 64
	// rateAging is what a rate that was reached still counts one round trip later.
	rateAging = 0.9
	// mostBurst is how many messages are sent at once, or those of burstTime, as exact as timers are.
	mostBurst, burstTime = 10, 2 * time.Millisecond
	// recentIDs is how many message IDs of separate answers are remembered, so that copies of them
	// are acknowledged too.
	recentIDs = 64
	// maxUnacknowledged is how many answers may wait to be acknowledged; further ones are sent
	// once.
	maxUnacknowledged = 1024
)

// EndpointConfig says how an [Endpoint] behaves. Zero fields stand for the defaults.
type EndpointConfig struct {
	// Window is the most exchanges under way at a time. RFC 7252, section 4.7, allows one (NSTART)
	// unless there is a congestion control: see grow and congested. Default 4096, which is what
	// 100 Mbit/s carry in 300 ms.
	Window int
	// AckTimeout is how long the first copy of a message waits to be acknowledged; each further
	// wait is twice as long, of a request up to a second. Once round trips have been measured,
	// their time counts instead. Default 2 s (RFC 7252, section 4.8).
	AckTimeout time.Duration
	// MaxRetransmit is how often a message is sent again after these waits. Default 4 (RFC 7252,
	// section 4.8).
	MaxRetransmit int
	// Timeout is how long a request waits for its answer in all. It must be positive.
	Timeout time.Duration
	// Dial makes a socket that is connected to a peer, which must be a [net.PacketConn] as well,
	// unless one was given. Only then requests can be made.
	Dial func() (net.Conn, error)

	// Workers is how many requests of peers are served at a time; more are left in the buffer of
	// the kernel, and dropped when that is full; peers then ask again. Default 1.
	Workers int
	// AckDelay is after what time a request of the peer is acknowledged apart from its answer; it
	// must be below the 2 s after which peers ask again. Default 1 s.
	AckDelay time.Duration
	// Paths are the resources that may be requested, and Handler serves them: it must call
	// [Packet.Respond] once, and may wait. If it is nil peers are told that we have nothing.
	Paths   Paths
	Handler func(p *Packet)
}

// Endpoint is a UDP socket (RFC 7252), over which each side may ask the other. What has to be
// acknowledged is sent again by timers, so that nobody waits for it. Its methods are safe for
// concurrent use.
type Endpoint struct {
	requester
	conn   net.PacketConn // nil until it is made
	writer io.Writer      // to the only peer, if the socket is connected
	config EndpointConfig

	unacked   map[messageKey]*confirmable
	busy      map[messageKey]struct{} // requests that are being served
	nextID    uint16
	messages  int       // requests that were sent
	lastHeard time.Time // last answer
	newest    time.Time // when the last request was sent that has been answered
	recent    [recentIDs]uint16
	recents   int

	// Congestion control: how many exchanges may be under way, as TCP has it.
	window    float64
	threshold float64
	lastLoss  time.Time
	lossy     float64       // share of messages of late that were lost
	roundTrip time.Duration // smoothed, 0 if not known (RFC 6298)
	variation time.Duration
	shortest  time.Duration // round trip
	period    time.Time     // when the present one has begun: each is about a round trip
	answers   int           // in it
	lowest    time.Duration // round trip in it
	queue     bool          // there was one in the period before
	rate      float64       // most answers per second of a period, of late
	credit    float64       // messages that may be sent at once, at creditAt
	creditAt  time.Time
	pausing   bool          // what waits will be sent
	unsure    uint16        // the last message of which it is not known which copy was answered,
	unsureFor time.Duration // and how long after the first one that was; 0 if there is none
}

// messageKey names a message: they are told apart by endpoint and message ID (RFC 7252, section
// 4.5).
type messageKey struct {
	peer string // "" if the socket is connected
	id   uint16
}

// confirmable is a message that is sent until it is acknowledged: a request or an answer of ours.
type confirmable struct {
	endpoint *Endpoint
	key      messageKey
	addr     net.Addr
	bytes    []byte
	exchange *Exchange // nil for an answer
	began    time.Time
	wait     time.Duration // for an answer to the last copy
	sent     time.Time     // when that was sent
	copies   int
	early    int  // copies that were sent before the wait was over
	acked    bool // the answer comes apart, and must not be requested again
	timer    *time.Timer
}

// NewEndpoint makes an endpoint of a socket, which is its own from then on. If there is none,
// requests wait until config.Dial has made it. [Endpoint.Run] must be called.
func NewEndpoint(conn net.PacketConn, config EndpointConfig) *Endpoint {
	config.Window = cmp.Or(config.Window, 4096)
	config.AckTimeout = cmp.Or(config.AckTimeout, 2*time.Second)
	config.MaxRetransmit = cmp.Or(config.MaxRetransmit, 4)
	config.Workers = cmp.Or(config.Workers, 1)
	config.AckDelay = cmp.Or(config.AckDelay, time.Second)
	e := &Endpoint{
		conn:      conn,
		config:    config,
		unacked:   make(map[messageKey]*confirmable),
		busy:      make(map[messageKey]struct{}),
		nextID:    uint16(rand.Uint32()),
		threshold: float64(config.Window),
	}
	e.window = e.least()
	e.requester = requester{
		transport: e,
		sent:      make(map[uint32]sentRequest),
		lastToken: rand.Uint32(),
		tokenSize: datagramTokenSize,
	}
	return e
}

// Run makes the socket if there is none, and receives datagrams by several goroutines, each of
// which serves a request at a time, until the socket is closed or its read deadline has passed. It
// closes the socket, and returns why it has ended.
func (e *Endpoint) Run() error {
	if e.conn != nil || e.connect(e.config.Dial) {
		var group sync.WaitGroup
		for range e.config.Workers {
			group.Go(func() {
				err := e.receive()
				e.Lock()
				defer e.Unlock()
				if e.err == nil {
					e.err = err
				}
			})
		}
		group.Wait()
		e.Close(errClosed)
	}
	_, err := e.State()
	return err
}

// open implements transport.
func (e *Endpoint) open(conn net.Conn) { e.conn, e.writer = conn.(net.PacketConn), conn }

// Close closes the socket. All exchanges fail with the error. It does not wait.
func (e *Endpoint) Close(err error) {
	e.Lock()
	defer e.Unlock()
	e.end(err)
}

// Release is Close: there is no connection that the peer would have to be told of.
func (e *Endpoint) Release(_ time.Duration, err error) { e.Close(err) }

// end makes all exchanges fail, and closes the socket. The lock must be held.
func (e *Endpoint) end(err error) {
	if e.err == nil {
		e.err = err
	}
	e.failAll(err)
	for _, m := range e.unacked {
		m.timer.Stop()
	}
	clear(e.unacked)
	if e.conn != nil {
		e.conn.Close()
	}
}

func (e *Endpoint) drop(m *confirmable) {
	m.timer.Stop()
	delete(e.unacked, m.key)
}

// least returns the least window.
func (e *Endpoint) least() float64 { return min(firstWindow, float64(e.config.Window)) }

// hasRoom implements transport.
func (e *Endpoint) hasRoom() bool {
	return e.conn != nil && float64(len(e.sent)) < e.window && e.paced()
}

// paced reports whether a message may be sent now, which are spread over the round trip, but for
// some: short queues have no room for a window at once (RFC 9002, section 7.7). If not, what waits
// is sent later. The lock must be held.
func (e *Endpoint) paced() bool {
	if e.roundTrip == 0 {
		return true
	}
	now, gain := time.Now(), 1.25
	if e.window < e.threshold {
		gain = 2
	}
	rate := gain * e.window / e.roundTrip.Seconds()
	e.credit = min(e.credit+rate*now.Sub(e.creditAt).Seconds(), max(mostBurst, rate*burstTime.Seconds()))
	e.creditAt = now
	if e.credit < 1 && !e.pausing {
		e.pausing = true
		time.AfterFunc(time.Duration(mostBurst/2/rate*float64(time.Second)), func() {
			e.Lock()
			e.pausing = false
			e.Unlock() // which sends
		})
	}
	return e.credit >= 1
}

// forget implements transport.
func (e *Endpoint) forget(x *Exchange) {
	delete(e.sent, uint32(x.token.Value))
	e.drop(x.sent)
	x.sent = nil
}

// transmit implements transport.
func (e *Endpoint) transmit(x *Exchange) {
	e.credit--
	if e.messages++; e.messages == messagesPerSocket {
		e.full = true
		time.AfterFunc(e.config.Timeout, e.leave)
	}
	b := make([]byte, 0, typicalRequest+len(x.Payload))
	for e.nextID++; e.unacked[messageKey{id: e.nextID}] != nil; e.nextID++ {
	}
	b = x.Store.append(appendDatagramHead(b, message.Confirmable, x.Store.method(x), e.nextID, x.token), x)
	m := e.confirm(messageKey{id: e.nextID}, nil, appendPayload(b, x.Payload), e.timeout())
	m.exchange, x.sent = x, m
	m.timer.Reset(e.checkAfter(m))
	e.outbox = append(e.outbox, m)
}

// leave closes the socket once nothing is under way any more.
func (e *Endpoint) leave() {
	e.Lock()
	defer e.Unlock()
	if len(e.sent) > 0 || e.first() != nil || time.Since(e.lastHeard) < e.config.Timeout/2 {
		time.AfterFunc(e.config.Timeout, e.leave)
		return
	}
	e.end(ErrReleased)
}

// confirm remembers a message that is to be acknowledged, which the caller then sends. The lock
// must be held.
func (e *Endpoint) confirm(key messageKey, addr net.Addr, b []byte, wait time.Duration) *confirmable {
	now := time.Now()
	m := &confirmable{endpoint: e, key: key, addr: addr, bytes: b, began: now, sent: now, wait: wait, copies: 1}
	m.timer = time.AfterFunc(wait, func() { e.expire(m) })
	e.unacked[key] = m
	return m
}

// checkAfter returns how long after a copy of a message it is checked whether that was lost: at the
// end of its wait, but a few times before, when what was sent later should have been answered: if
// it has, this was lost (RFC 8985). The lock must be held.
func (e *Endpoint) checkAfter(m *confirmable) time.Duration {
	if m.exchange == nil || e.roundTrip == 0 || m.early == mostEarly {
		return m.wait
	}
	return min(m.wait, e.roundTrip+2*e.late())
}

// late returns by how much answers may change their order. The lock must be held.
func (e *Endpoint) late() time.Duration { return max(leastDelay, e.roundTrip/4, 4*e.variation) }

// write sends a message. An error is that of the socket, mostly "connection refused" for what was
// sent before. After any other the endpoint is of no more use for requests: where the network has
// changed, the socket still has the address that this machine had.
func (e *Endpoint) write(m *confirmable) {
	if err := e.writeTo(m.bytes, m.addr); err != nil && m.exchange != nil {
		e.Lock()
		defer e.Unlock()
		if e.unacked[m.key] == m && !errors.Is(err, syscall.ECONNREFUSED) {
			e.end(err)
		}
		e.lost(m, err)
	}
}

func (e *Endpoint) writeTo(b []byte, addr net.Addr) error {
	if e.writer != nil {
		_, err := e.writer.Write(b)
		return err
	}
	_, err := e.conn.WriteTo(b, addr)
	return err
}

// expire is called when a message was not acknowledged, or a request not answered, in time.
func (e *Endpoint) expire(m *confirmable) {
	e.Lock()
	defer e.Unlock()
	if e.unacked[m.key] != m {
		return
	}
	now := time.Now()
	left := e.config.Timeout - now.Sub(m.began)
	if m.acked && left > 0 {
		return // the acknowledgement came at the same time
	}
	rest := m.wait - now.Sub(m.sent)
	if m.exchange != nil {
		if rest > 0 && e.newest.Sub(m.sent) <= e.late() {
			m.timer.Reset(min(rest, e.checkAfter(m)))
			return
		}
		if m.early == 0 { // later, the peer may as well take its time for this one
			e.congested(m.sent, now)
		}
	}
	switch {
	case rest > 0:
		m.early++
	case m.copies-m.early > e.config.MaxRetransmit || left <= 0 && m.exchange != nil:
		e.lost(m, fmt.Errorf("%w (%v)", ErrSilent, now.Sub(m.began).Round(time.Millisecond)))
		return
	case m.exchange == nil:
		m.wait *= 2
	default:
		m.wait = min(2*m.wait, max(m.wait, mostDoubled))
	}
	if m.exchange != nil {
		m.wait = min(m.wait, left)
		e.credit-- // further requests are sent later
	}
	m.copies++
	m.sent = now
	m.timer.Reset(e.checkAfter(m))
	e.outbox = append(e.outbox, m)
}

// lost gives a message up. If nothing at all was heard lately, the endpoint is of no more use for
// requests: the peer may have got another address. The lock must be held.
func (e *Endpoint) lost(m *confirmable, err error) {
	switch {
	case e.unacked[m.key] != m:
	case m.exchange == nil:
		e.drop(m)
	case time.Since(e.lastHeard) > e.config.Timeout/2:
		e.end(err)
	default:
		e.take(m.exchange, err)
	}
}

// timeout returns how long to wait for the answer to a request that is sent for the first time. The
// lock must be held.
func (e *Endpoint) timeout() time.Duration {
	timeout := e.config.AckTimeout
	if e.roundTrip > 0 {
		// Where round trips have not varied so far, a queue may begin.
		late := max(min(e.roundTrip/2, leastTimeout), 4*e.variation)
		timeout = max(min(timeout, leastTimeout), e.roundTrip+late)
	}
	return min(e.config.Timeout, time.Duration(float64(timeout)*(1+(ackRandomFactor-1)*rand.Float64())))
}

// measure takes note of an answer. The lock must be held.
func (e *Endpoint) measure(m *confirmable) {
	e.lastHeard, e.answered = time.Now(), true
	if m.sent.After(e.newest) && e.lastHeard.Sub(m.sent) >= e.shortest {
		e.newest = m.sent
	}
	e.grow(m)
	took := e.lastHeard.Sub(m.began)
	if m.copies > 1 {
		e.unsure, e.unsureFor = m.key.id, took
		return
	}
	e.sample(took)
}

// grow widens the window after an answer: by one, or by one per round trip while there is a queue,
// and once something was lost (RFC 5681, section 3.1). Beyond mostQueued it does so only while no
// more exchanges than that wait in queues, as the difference between the round trip and the
// shortest one tells (TCP Vegas). The lock must be held.
func (e *Endpoint) grow(m *confirmable) {
	e.answers++
	e.lossy -= e.lossy / lossMemory
	if took := e.lastHeard.Sub(e.period); took >= max(e.roundTrip, time.Millisecond) {
		e.queue = e.lowest > e.shortest+max(leastDelay, min(mostDelay, e.shortest/8))
		e.rate = max(float64(e.answers)/took.Seconds(), rateAging*e.rate)
		e.answers, e.lowest, e.period = 0, 0, e.lastHeard
	}
	if m.began.Before(e.lastLoss) || 2*float64(len(e.sent)) < e.window {
		return // it was sent when there was more (RFC 9002, section 7.3.2), or the window is not used
	}
	switch queued := e.window * (1 - float64(e.shortest)/float64(e.roundTrip)); {
	case e.window >= mostQueued && queued >= mostQueued:
	case e.window < e.threshold && !e.queue:
		e.window++
	default:
		e.window += 1 / e.window
	}
	e.window = min(e.window, float64(e.config.Window))
}

// sample takes note of a round trip. The lock must be held.
func (e *Endpoint) sample(took time.Duration) {
	if e.roundTrip == 0 {
		e.roundTrip, e.variation, e.shortest = took, took/2, took
		return
	}
	e.shortest = min(e.shortest, took)
	e.lowest = min(cmp.Or(e.lowest, took), took)
	e.variation += ((e.roundTrip - took).Abs() - e.variation) / 4
	e.roundTrip += (took - e.roundTrip) / 8
}

// congested takes note that what was sent at a time was lost. What was under way at the last loss
// was lost together with that, and does not count again (RFC 6582, section 3.2). Nor do a few
// without a queue, which are lost at random: TCP Veno tells them by that (Fu and Liew 2003). The
// window halves, but what the line has carried is not too much for it (TCP Westwood). Before a
// round trip is known, perhaps nothing was lost, and the threshold remains. The lock must be held.
func (e *Endpoint) congested(sent, now time.Time) {
	e.lossy += (1 - e.lossy) / lossMemory
	if sent.Before(e.lastLoss) || e.roundTrip > 0 && !e.queue && e.lossy < mostRandom {
		return
	}
	e.lastLoss = now
	e.window = max(e.least(), e.window/2, min(e.window, e.rate*e.shortest.Seconds()))
	if e.roundTrip > 0 {
		e.threshold = e.window
	}
}

// receive takes datagrams until the socket is closed.
func (e *Endpoint) receive() error {
	buffer := make([]byte, maxDatagramSize+1)
	for {
		n, addr, err := e.conn.ReadFrom(buffer)
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case err != nil:
			// Mostly "connection refused", which anybody could forge: what is under way fails, no
			// more.
			e.Lock()
			e.failSent(err)
			over := e.err
			e.Unlock()
			if over != nil {
				return over
			}
			time.Sleep(time.Millisecond)
			continue
		case n > maxDatagramSize:
			continue
		}
		switch m, err := parseDatagram(buffer[:n]); {
		case err == nil:
			e.packet(m, addr)
		case err != errVersion && m.Type == message.Confirmable: // it would come again (RFC 7252, section 4.2)
			_ = e.writeTo(emptyMessage(message.Reset, m.ID), addr)
		}
	}
}

// packet takes one message.
func (e *Endpoint) packet(m datagram, addr net.Addr) {
	key := messageKey{id: m.ID}
	if e.writer == nil {
		key.peer = addr.String()
	}
	switch confirmable := m.Type == message.Confirmable; {
	case m.Type == message.Acknowledgement || m.Type == message.Reset:
		e.acknowledged(m, key)
	case isRequest(m.Code):
		e.serve(m, key, addr)
	case isResponse(m.Code) && e.response(m) && confirmable:
		// If it is lost, the peer sends again.
		_ = e.writeTo(emptyMessage(message.Acknowledgement, m.ID), addr)
	case confirmable:
		// A ping, or an answer that nobody waits for.
		_ = e.writeTo(emptyMessage(message.Reset, m.ID), addr)
	}
}

// acknowledged takes an acknowledgement or a reset, and the answer that the former may carry.
func (e *Endpoint) acknowledged(m datagram, key messageKey) {
	e.Lock()
	defer e.Unlock()
	sent := e.unacked[key]
	switch {
	case sent == nil:
		if m.ID == e.unsure && e.unsureFor > 0 {
			// Each copy has an answer: the message was sent again too early.
			e.sample(e.unsureFor)
			e.unsureFor = 0
		}
	case sent.exchange == nil:
		e.drop(sent)
	case m.Type == message.Reset:
		e.lastHeard, e.answered = time.Now(), true
		e.take(sent.exchange, errReset)
	case m.Code == codes.Empty:
		sent.acked = true
		sent.timer.Reset(e.config.Timeout - time.Since(sent.began))
	case isResponse(m.Code) && m.Token == sent.exchange.token:
		e.accept(sent.exchange, m)
	}
}

// response takes an answer that comes apart. It reports whether it, or a copy of it, was waited
// for.
func (e *Endpoint) response(m datagram) bool {
	e.Lock()
	defer e.Unlock()
	s, ok := e.find(m.Token)
	if !ok {
		return slices.Contains(e.recent[:min(e.recents, recentIDs)], m.ID)
	}
	if e.accept(s.exchange, m) {
		e.recent[e.recents%recentIDs] = m.ID
		e.recents++
	}
	return true
}

// accept takes a response. It reports whether it could be understood; if not, it might as well not
// have come. The lock must be held.
func (e *Endpoint) accept(x *Exchange, m datagram) bool {
	var response Response
	payload, err := parseResponse(m.Body, &response)
	if err != nil {
		return false
	}
	if answer := response.Block1; x.Payload != nil && answer.Present && answer.Number < x.Block.Number {
		return false // a late copy of the answer to the part before, which had the same token
	}
	x.answer(m.Code, &response, payload)
	x.Again += x.sent.copies - 1
	e.measure(x.sent)
	e.take(x, nil)
	return true
}

// Packet is a request of the peer that came in a datagram.
type Packet struct {
	Request
	Peer string // address and port

	endpoint    *Endpoint
	key         messageKey
	addr        net.Addr
	confirmable bool
	timer       *time.Timer
	acked       bool
}

// serve serves a request. If that takes long, the request is acknowledged meanwhile, and the answer
// comes apart (RFC 7252, section 5.2.2).
func (e *Endpoint) serve(m datagram, key messageKey, addr net.Addr) {
	p := &Packet{endpoint: e, key: key, addr: addr, Peer: key.peer, confirmable: m.Type == message.Confirmable}
	p.Code, p.Token = m.Code, m.Token
	if e.config.Handler == nil {
		p.Respond(refusal(m.Code), nil, nil)
		return
	}
	e.Lock()
	_, busy := e.busy[key]
	e.busy[key] = struct{}{}
	if p.confirmable && !busy {
		p.timer = time.AfterFunc(e.config.AckDelay, p.acknowledge)
	}
	e.Unlock()
	if busy {
		return
	}
	e.config.Paths.parse(m.Body, &p.Request)
	e.config.Handler(p)
}

// acknowledge says that the request has come, and the answer will.
func (p *Packet) acknowledge() {
	e := p.endpoint
	e.Lock()
	_, busy := e.busy[p.key]
	p.acked = busy
	e.Unlock()
	if busy {
		_ = e.writeTo(emptyMessage(message.Acknowledgement, p.key.id), p.addr)
	}
}

// Respond answers the request. It does not wait until the answer is acknowledged: a timer sees to
// that.
func (p *Packet) Respond(code codes.Code, options, payload []byte) {
	e := p.endpoint
	e.Lock()
	delete(e.busy, p.key)
	if p.timer != nil {
		p.timer.Stop()
	}
	key, kind := p.key, message.Acknowledgement
	if p.acked || !p.confirmable {
		e.nextID++
		key.id, kind = e.nextID, message.NonConfirmable
		if p.acked && e.err == nil && len(e.unacked) < maxUnacknowledged && e.unacked[key] == nil {
			kind = message.Confirmable
		}
	}
	b := make([]byte, 0, maxDatagramSize)
	b = appendDatagramHead(b, kind, code, key.id, p.Token)
	b = appendPayload(append(b, options...), payload)
	if kind == message.Confirmable {
		e.confirm(key, p.addr, b, e.config.AckTimeout)
	}
	e.Unlock()
	// What is lost is sent again, or requested again.
	_ = e.writeTo(b, p.addr)
}
