// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"slices"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// Resources below the path of a store: that which has its blocks
// (https://eris.codeberg.page/eer/coap.xml), and that which says which ones these are
// (docs/formats.md).
const (
	BlocksSegment = "blocks"
	HaveSegment   = "have"
)

// WellKnownPath returns the path of the well-known store, segment by segment.
func WellKnownPath() []string { return []string{".well-known", "eris"} }

// Requests makes the requests for the blocks of one store. It is safe for concurrent use.
type Requests struct {
	// HopLimit, if not 0, is how many servers a GET may go through (RFC 8768), the one that it is
	// sent to among them. It must be set before the first request.
	HopLimit uint8

	path     []byte // the options Uri-Path
	document bool   // a resource that is not a store
}

// NewRequests returns the Requests for the store at the given path, segment by segment, without
// "blocks". References in queries are Base32, which every server known takes; raw bytes would be
// shorter, but libraries that expect text refuse them.
func NewRequests(path []string) *Requests {
	r := NewDocument(append(slices.Clone(path), BlocksSegment))
	r.document = false
	return r
}

// NewDocument returns the Requests for a resource that is no store, at the given path. They have no
// queries; payloads are posted.
func NewDocument(path []string) *Requests {
	r := &Requests{document: true}
	var previous message.OptionID
	for _, segment := range path {
		r.path = appendOption(r.path, previous, message.URIPath, segment)
		previous = message.URIPath
	}
	return r
}

// referenceTextSize is the length of a reference in Base32.
const referenceTextSize = 52

// method returns the method of a request.
func (r *Requests) method(x *Exchange) codes.Code {
	switch {
	case x.Payload == nil:
		return codes.GET
	case r.document:
		return codes.POST
	}
	return codes.PUT
}

// append appends the options of a request. Of a GET: path, query, Hop-Limit if there is one, Block2
// if it is present, and Size1, which some servers insist on. Of a PUT: path, Block1 if it is
// present, and Size1 if a total is given.
func (r *Requests) append(dst []byte, x *Exchange) []byte {
	dst = append(dst, r.path...)
	if r.document {
		return dst
	}
	previous, block, size := message.URIPath, message.Block1, uint32(x.Total)
	if x.Payload == nil {
		dst = appendOptionHead(dst, int(message.URIQuery-message.URIPath), referenceTextSize)
		dst, _ = x.Reference.AppendText(dst) // never fails
		previous, block, size = message.URIQuery, message.Block2, uint32(x.Size)
		if r.HopLimit != 0 {
			dst = AppendUintOption(dst, previous, hopLimit, uint32(r.HopLimit))
			previous = hopLimit
		}
	}
	if x.Block.Present {
		dst = AppendUintOption(dst, previous, block, x.Block.uint())
		previous = block
	}
	if size != 0 {
		dst = AppendUintOption(dst, previous, message.Size1, size)
	}
	return dst
}

// Overhead returns how many bytes a message on a stream with a payload has at most beside that.
func (r *Requests) Overhead() int {
	x := Exchange{Block: Block{Number: maxBlockNumber, Present: true}, Total: 1 << 15, Payload: []byte{}}
	return maxHeadSize + len(r.append(nil, &x)) + 1
}

// Request is what a server understands of a request.
type Request struct {
	Code  codes.Code // the method
	Token Token
	// Refuse is codes.Empty, or the code of the response that the options alone call for: 4.00 if
	// the message is malformed, 4.02 for critical options that are unknown or have an unusable
	// value, 4.06 for an Accept of something else than octets, 5.05 for a proxy request. The other
	// fields are then not to be looked at.
	Refuse       codes.Code
	Resource     int            // index of the path, or -1: not found
	Reference    eris.Reference // of a GET
	HasReference bool           // the one and only query is a reference
	Size         eris.BlockSize // from Size1, perhaps not valid: 0 if there is none
	HopLimit     uint8          // 0 if there is none
	Block1       Block
	Block2       Block
	Tag          string // the options Request-Tag, each behind its length
	Payload      []byte // a part of what was parsed
}

// maxRequestTag is the greatest length in bytes of a Request-Tag (RFC 9175, section 3.2.1).
const maxRequestTag = 8

// Paths are the paths of the resources of a server, each of at most eight segments.
type Paths [][]string

// find returns the index of a path, or -1.
func (p Paths) find(segments [][]byte) int {
	return slices.IndexFunc(p, func(path []string) bool {
		return slices.EqualFunc(path, segments, func(a string, b []byte) bool { return a == string(b) })
	})
}

// parse reads the options of a request. Where the path leads is for the handler to look at.
//
// The query of a PUT is of no interest, hence a bad reference is not an error here.
func (p Paths) parse(body []byte, request *Request) {
	*request = Request{Code: request.Code, Token: request.Token, Resource: -1}
	request.Refuse = p.parseOptions(body, request)
}

func (p Paths) parseOptions(body []byte, request *Request) codes.Code {
	var path [8][]byte
	segments, queries := 0, 0
	refuse := codes.Empty
	options := optionWalk{rest: body}
	for {
		option, ok := options.next()
		if !ok {
			break
		}
		switch option.meaning() {
		case message.URIPath:
			if segments < len(path) {
				path[segments] = option.Value
			}
			segments++
		case message.URIQuery:
			request.Reference, request.HasReference = parseQuery(option.Value)
			queries++
		case message.Size1:
			// The option is elective: a value that is too long is passed over (RFC 7252, section
			// 5.4.3).
			n, _ := parseUint(option.Value)
			request.Size = eris.BlockSize(n)
		case message.Block1:
			if !request.Block1.Parse(option.Value) {
				refuse = codes.BadOption
			}
		case message.Block2:
			if !request.Block2.Parse(option.Value) {
				refuse = codes.BadOption
			}
		case requestTag:
			if len(option.Value) <= maxRequestTag && len(request.Tag) < 4*maxRequestTag {
				request.Tag += string(byte(len(option.Value))) + string(option.Value)
			}
		case hopLimit:
			// RFC 8768, section 3: what is not from 1 to 255 is refused.
			if n, err := parseUint(option.Value); err != nil || n < 1 || n > 255 {
				refuse = codes.BadRequest
			} else {
				request.HopLimit = uint8(n)
			}
		case message.URIHost, message.URIPort:
			// Whoever connected to us means us.
		case message.Accept:
			if n, err := parseUint(option.Value); err != nil || len(option.Value) > 2 {
				refuse = codes.BadOption
			} else if n != uint32(message.AppOctets) && refuse == codes.Empty {
				refuse = codes.NotAcceptable
			}
		case message.ProxyURI, message.ProxyScheme:
			return codes.ProxyingNotSupported
		default:
			if option.critical() {
				refuse = codes.BadOption
			}
		}
	}
	if options.err != nil {
		return codes.BadRequest
	}
	if refuse != codes.Empty {
		return refuse
	}
	if queries > 1 {
		request.HasReference = false
	}
	if segments <= len(path) {
		request.Resource = p.find(path[:segments])
	}
	request.Payload = options.payload()
	return codes.Empty
}

// parseQuery reads the reference of a block from the value of Uri-Query in a GET: its 32 bytes, or
// their Base32. The length tells them apart.
func parseQuery(value []byte) (ref eris.Reference, ok bool) {
	if len(value) == len(ref) {
		return eris.Reference(value), true
	}
	ref, err := eris.ParseReference(value)
	return ref, err == nil
}

// Response is what a client understands of a response.
type Response struct {
	Block1 Block
	Block2 Block
	MaxAge uint32 // in seconds, 0 if not given
	// Unusable says that a critical option is unknown or has an unusable value, so that the
	// response must be rejected (RFC 7252, section 5.4.1).
	Unusable bool
}

// parseResponse reads the options of a response, and returns the payload. The error says that it is
// malformed.
func parseResponse(body []byte, response *Response) (payload []byte, err error) {
	*response = Response{}
	options := optionWalk{rest: body}
	for {
		option, ok := options.next()
		if !ok {
			return options.payload(), options.err
		}
		switch option.meaning() {
		case message.Block1:
			if !response.Block1.Parse(option.Value) {
				response.Unusable = true
			}
		case message.Block2:
			if !response.Block2.Parse(option.Value) {
				response.Unusable = true
			}
		case message.MaxAge:
			response.MaxAge, _ = parseUint(option.Value)
		default:
			if option.critical() {
				response.Unusable = true
			}
		}
	}
}
