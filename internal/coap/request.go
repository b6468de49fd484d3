// SPDX-License-Identifier: GPL-3.0-or-later

package coap

import (
	"errors"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
)

// blocksSegment is the resource below the path of a store that has its blocks (https://eris.codeberg.page/eer/coap.xml).
const blocksSegment = "blocks"

// Requests makes the requests for the blocks of one store. It is safe for concurrent use.
type Requests struct {
	path []byte // the options Uri-Path
	raw  bool
}

// NewRequests returns the Requests for the store at the given path, segment by segment, without "blocks". References in
// queries are Base32, which every server known takes, or raw bytes, which makes requests shorter but which libraries that
// expect text refuse.
func NewRequests(path []string, raw bool) *Requests {
	r := &Requests{raw: raw}
	var previous message.OptionID
	for _, segment := range append(append([]string{}, path...), blocksSegment) {
		r.path = AppendOption(r.path, previous, message.URIPath, segment)
		previous = message.URIPath
	}
	return r
}

// AppendGet appends the body of a GET: path, query, Block2 if it is present, and Size1, which some servers insist on.
func (r *Requests) AppendGet(dst []byte, ref *eris.Reference, size eris.BlockSize, block Block) []byte {
	dst = append(dst, r.path...)
	if r.raw {
		dst = AppendOption(dst, message.URIPath, message.URIQuery, ref[:])
	} else {
		dst = appendOptionHead(dst, int(message.URIQuery-message.URIPath), textReferenceSize)
		dst = appendReferenceText(dst, ref)
	}
	previous := message.URIQuery
	if block.Present {
		dst = AppendUintOption(dst, previous, message.Block2, block.Uint())
		previous = message.Block2
	}
	return AppendUintOption(dst, previous, message.Size1, uint32(size))
}

// GetSize returns how many bytes AppendGet appends.
func (r *Requests) GetSize(size eris.BlockSize, block Block) int {
	n := len(r.path)
	if r.raw {
		n += optionSize(int(message.URIQuery-message.URIPath), rawReferenceSize)
	} else {
		n += optionSize(int(message.URIQuery-message.URIPath), textReferenceSize)
	}
	previous := message.URIQuery
	if block.Present {
		n += optionSize(int(message.Block2-previous), uintSize(block.Uint()))
		previous = message.Block2
	}
	return n + optionSize(int(message.Size1-previous), uintSize(uint32(size)))
}

// AppendPut appends the body of a PUT: path, Block1 if it is present, the size of the whole if given, and the payload, which
// must not be empty.
func (r *Requests) AppendPut(dst []byte, block Block, total int, payload []byte) []byte {
	dst = append(dst, r.path...)
	previous := message.URIPath
	if block.Present {
		dst = AppendUintOption(dst, previous, message.Block1, block.Uint())
		previous = message.Block1
	}
	if total != 0 {
		dst = AppendUintOption(dst, previous, message.Size1, uint32(total))
	}
	dst = append(dst, payloadMarker)
	return append(dst, payload...)
}

// PutSize returns how many bytes AppendPut appends for a payload of the given length.
func (r *Requests) PutSize(block Block, total, payload int) int {
	n := len(r.path)
	previous := message.URIPath
	if block.Present {
		n += optionSize(int(message.Block1-previous), uintSize(block.Uint()))
		previous = message.Block1
	}
	if total != 0 {
		n += optionSize(int(message.Size1-previous), uintSize(uint32(total)))
	}
	return n + 1 + payload
}

// Request is what a server understands of a request.
type Request struct {
	Resource     int            // index of the path, or -1: not found
	Reference    eris.Reference // of a GET
	HasReference bool           // the one and only query is a reference
	Size         eris.BlockSize // from Size1: 0 if there is none
	BadSize      bool           // there is a Size1, but it is no block size
	Block1       Block
	Block2       Block
	Tag          uint64 // a digest of the options Request-Tag, 0 if there are none
	Payload      []byte // a part of what was parsed
}

// maxRequestPaths bounds the number of paths that Paths can hold.
const maxRequestPaths = 64

// maxRequestTag is the greatest length in bytes of a Request-Tag (RFC 9175, section 3.2.1).
const maxRequestTag = 8

var errManyPaths = errors.New("more store paths than a server can have")

// Paths knows the paths of the resources of a server. It is safe for concurrent use once all of them have been added.
type Paths struct {
	paths [][]string // of stores, with "blocks"; then others
}

// NewPaths returns the Paths for the given store paths, segment by segment, without "blocks". It returns an error if there
// are more than 64.
func NewPaths(paths [][]string) (*Paths, error) {
	if len(paths) > maxRequestPaths {
		return nil, errManyPaths
	}
	p := &Paths{}
	for _, path := range paths {
		p.paths = append(p.paths, append(append([]string{}, path...), blocksSegment))
	}
	return p, nil
}

// Add adds the path of a resource that is not a store, segment by segment, and returns its index. It returns an error if there
// are more than 64 paths.
func (p *Paths) Add(path []string) (index int, err error) {
	if len(p.paths) == maxRequestPaths {
		return 0, errManyPaths
	}
	p.paths = append(p.paths, path)
	return len(p.paths) - 1, nil
}

// ParseRequest reads the options of a request. It returns codes.Empty, or the code of the response that the options alone
// call for: 4.00 if the message is malformed, 4.02 for critical options that are unknown or have an unusable value, 4.06 for
// an Accept of something else than octets, 5.05 for a proxy request. Where the path leads is for the caller to judge.
//
// The query of a PUT is of no interest, hence a bad reference is not an error here.
func (p *Paths) ParseRequest(body []byte, request *Request) codes.Code {
	*request = Request{Resource: -1}
	candidates := ^uint64(0) >> (maxRequestPaths - len(p.paths))
	if len(p.paths) == 0 {
		candidates = 0
	}
	segments, queries := 0, 0
	refuse := codes.Empty
	options := ParseOptions(body)
	for {
		option, ok := options.Next()
		if !ok {
			break
		}
		switch option.Number {
		case message.URIPath:
			for i, path := range p.paths {
				if segments >= len(path) || path[segments] != string(option.Value) {
					candidates &^= 1 << i
				}
			}
			segments++
		case message.URIQuery:
			request.Reference, request.HasReference = ParseQuery(option.Value)
			queries++
		case message.Size1:
			n, err := Uint(option.Value)
			request.Size = eris.BlockSize(n)
			// The option is elective: a value that is too long is passed over (RFC 7252, section 5.4.3).
			if err != nil {
				request.Size = 0
			} else if !request.Size.Valid() {
				request.BadSize = true
			}
		case message.Block1:
			if !takeBlock(&request.Block1, option.Value) {
				refuse = codes.BadOption
			}
		case message.Block2:
			if !takeBlock(&request.Block2, option.Value) {
				refuse = codes.BadOption
			}
		case RequestTag:
			if len(option.Value) <= maxRequestTag {
				request.Tag = mixTag(request.Tag, option.Value)
			}
		case message.URIHost, message.URIPort:
			// Whoever connected to us means us.
		case message.Accept:
			if n, err := Uint(option.Value); err != nil || len(option.Value) > 2 {
				refuse = codes.BadOption
			} else if n != uint32(message.AppOctets) && refuse == codes.Empty {
				refuse = codes.NotAcceptable
			}
		case message.ProxyURI, message.ProxyScheme:
			return codes.ProxyingNotSupported
		default:
			if option.Critical() {
				refuse = codes.BadOption
			}
		}
	}
	if options.Err() != nil {
		return codes.BadRequest
	}
	if refuse != codes.Empty {
		return refuse
	}
	if queries > 1 {
		request.HasReference = false
	}
	for i, path := range p.paths {
		if candidates&(1<<i) != 0 && len(path) == segments {
			request.Resource = i
			break
		}
	}
	request.Payload = options.Payload()
	return codes.Empty
}

// takeBlock reads an option Block1 or Block2, which must not be repeated.
func takeBlock(block *Block, value []byte) bool {
	b, err := ParseBlock(value)
	if err != nil || block.Present {
		return false
	}
	*block = b
	return true
}

// mixTag folds a Request-Tag into a digest (FNV-1a), which is never 0. It need not withstand an attack: it only tells the
// transfers of one peer apart.
func mixTag(digest uint64, tag []byte) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211
	if digest == 0 {
		digest = offset
	}
	digest = (digest ^ uint64(len(tag)+1)) * prime
	for _, b := range tag {
		digest = (digest ^ uint64(b)) * prime
	}
	return max(digest, 1)
}

// Response is what a client understands of a response.
type Response struct {
	Block1 Block
	Block2 Block
	Size2  uint32 // 0 if not given
	// Unusable says that a critical option is unknown or has an unusable value, so that the response must be rejected (RFC
	// 7252, section 5.4.1).
	Unusable bool
}

// ParseResponse reads the options of a response, from a walk that has not begun, to the payload. It returns the error of the
// walk.
func ParseResponse(options *Options, response *Response) error {
	*response = Response{}
	for {
		option, ok := options.Next()
		if !ok {
			return options.Err()
		}
		switch option.Number {
		case message.Block1:
			if !takeBlock(&response.Block1, option.Value) {
				response.Unusable = true
			}
		case message.Block2:
			if !takeBlock(&response.Block2, option.Value) {
				response.Unusable = true
			}
		case message.Size2:
			response.Size2, _ = Uint(option.Value)
		default:
			if option.Critical() {
				response.Unusable = true
			}
		}
	}
}
