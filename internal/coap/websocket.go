// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

const (
	// WebSocketPath is where a CoAP endpoint is found over WebSockets (RFC 8323, section 8.3).
	WebSocketPath = "/.well-known/coap"
	// WebSocketProtocol is the subprotocol that both sides must agree on (RFC 8323, section 4.1).
	WebSocketProtocol = "coap"

	// maxWebSocketMessage is more than the size in bytes of any message that is written.
	maxWebSocketMessage = 2 * MessageSize
	// webSocketPart is how many bytes of a message are read at a time, so that it is known that it
	// comes: as many as TLS gives away together.
	webSocketPart = 16 << 10
	// headRoom is how many bytes longer the head of a message is on other streams, at most.
	headRoom = 4
)

var (
	errText   = errors.New("WebSocket message is text, not binary")
	errLength = errors.New("length in a CoAP message over WebSockets is not zero")
	errShort  = errors.New("CoAP message over WebSockets is truncated")
)

// webSocket makes the byte stream of RFC 8323, section 3, of a WebSocket: there, each message is a
// binary message of its own, which has a length already, so that the length in its head is zero
// (section 4.2); nothing else differs. Hence whoever speaks CoAP over TCP can speak it over a
// WebSocket.
//
// It is a net.Conn for [Conn]. A peer that breaks the framing makes Read fail; messages above the
// limit of 64 KiB are not read to their end. A read or a write that its deadline ends is the end of
// the connection. What is written must be whole messages in the end. Wait is to be called after
// Close, as Conn does.
type webSocket struct {
	net.Conn // below it, whose deadlines hold
	socket   *websocket.Conn
	group    sync.WaitGroup
	close    sync.Once

	part func(head Head, bytes int) // told how much there is of a message; may be nil
	in   []byte                     // a message that was received, behind headRoom bytes
	rest []byte                     // what has not been read of it
	out  []byte                     // the message that is being written, with the head as on other streams

	mu    sync.Mutex
	fault error // of the peer
}

// NewWebSocket takes over a WebSocket whose opening handshake is done, and the connection that it
// was done on.
func NewWebSocket(socket *websocket.Conn, conn net.Conn) net.Conn {
	socket.SetReadLimit(MessageSize)
	return &webSocket{Conn: conn, socket: socket, in: make([]byte, headRoom+MessageSize+1)}
}

// Read returns what has been received.
func (w *webSocket) Read(b []byte) (int, error) {
	if len(w.rest) == 0 {
		err := w.receive()
		if websocket.CloseStatus(err) != -1 {
			return 0, io.EOF
		}
		if err != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.fault = err
			return 0, err
		}
	}
	n := copy(b, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

// receive receives a message.
func (w *webSocket) receive() error {
	kind, r, err := w.socket.Reader(context.Background())
	if err != nil {
		return err
	}
	if kind != websocket.MessageBinary {
		return errText
	}
	n := 0
	for err == nil && headRoom+n < len(w.in) {
		var more int
		more, err = r.Read(w.in[headRoom+n : min(headRoom+n+webSocketPart, len(w.in))])
		n += more
		if message := w.in[headRoom : headRoom+n]; more > 0 && n >= 2+maxTokenSize && w.part != nil {
			w.part(Head{Code: codes.Code(message[1]), Token: parseToken(message[2 : 2+min(message[0]&15, maxTokenSize)])}, n)
		}
	}
	switch {
	case err == nil, errors.Is(err, websocket.ErrMessageTooBig):
		return fmt.Errorf("%w: over WebSockets, limit %d", errMessageSize, MessageSize)
	case err != io.EOF: // that is the end of the message
		return err
	}
	start, err := fromWebSocket(w.in[:headRoom+n])
	w.rest = w.in[start : headRoom+n]
	return err
}

// fromWebSocket gives a message, which stands behind headRoom bytes, the head that it has on other
// streams, and returns where it starts then.
func fromWebSocket(b []byte) (start int, err error) {
	message := b[headRoom:]
	if len(message) < 2 {
		return 0, errShort
	}
	if message[0]>>4 != 0 {
		return 0, errLength
	}
	token := int(message[0] & 15)
	if token > maxTokenSize {
		return 0, errTokenSize
	}
	length := len(message) - 2 - token
	if length < 0 {
		return 0, errShort
	}
	// What is longer than the length of zero goes before it.
	head := AppendHead(make([]byte, 0, maxHeadSize), 0, Token{}, length)
	head = head[:len(head)-1] // the code is there already
	start = headRoom + 1 - len(head)
	copy(b[start:], head)
	b[start] |= byte(token)
	return start, nil
}

// Write sends the messages that are complete with these bytes.
func (w *webSocket) Write(b []byte) (int, error) {
	for written := 0; written < len(b); {
		n, err := w.write(b[written:])
		if err != nil {
			return written, err
		}
		written += n
	}
	return len(b), nil
}

// write takes bytes up to the end of a message, which it sends. It returns how many it took.
func (w *webSocket) write(b []byte) (int, error) {
	have := len(w.out)
	// Enough for the head first; then it is known how long the message is.
	w.out = append(w.out, b[:min(len(b), max(0, maxHeadSize-have))]...)
	head, err := ParseHead(w.out, maxWebSocketMessage)
	if err == ErrShortHead {
		return len(w.out) - have, nil
	}
	if err != nil {
		return 0, err
	}
	size := head.Size + head.Length
	n := min(len(b), size-have)
	w.out = append(w.out[:have], b[:n]...)
	if len(w.out) < size {
		return n, nil
	}
	message := w.out[head.Size-2-int(head.Token.Size):]
	message[0] = head.Token.Size
	w.out = w.out[:0]
	return n, w.socket.Write(context.Background(), websocket.MessageBinary, message)
}

// Close ends the connection. The peer is told, and given a moment to agree; the connection waits
// for that by Wait.
func (w *webSocket) Close() error {
	w.close.Do(func() {
		w.group.Go(func() {
			timer := time.AfterFunc(linger, func() { w.Conn.Close() })
			defer timer.Stop()
			// If the peer does not answer, or is gone already, that is the end all the same.
			_ = w.socket.Close(w.status())
			w.Conn.Close()
		})
	})
	return nil
}

// status returns what a WebSocket calls the end that this one has come to (RFC 6455, section
// 7.4.1).
func (w *webSocket) status() (websocket.StatusCode, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.fault == errText:
		return websocket.StatusUnsupportedData, w.fault.Error()
	case w.fault == errLength || w.fault == errShort || w.fault == errTokenSize:
		return websocket.StatusPolicyViolation, w.fault.Error()
	case errors.Is(w.fault, errMessageSize):
		return websocket.StatusMessageTooBig, ""
	}
	return websocket.StatusNormalClosure, ""
}

// Wait waits until all is over after Close: at most as long as the peer may take to agree.
func (w *webSocket) Wait() { w.group.Wait() }
