// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// Bounds on the texts that this package reads.
const (
	// MaxSexpSize is the length, in bytes, of the longest text that [ParseSexp], and hence every
	// parser of this package, accepts. An entry of an ACL takes about 150 bytes.
	MaxSexpSize = 1 << 20

	// maxSexpDepth bounds how deep lists may be nested. A signature has four levels, an ACL five.
	maxSexpDepth = 64
)

// Sexp is an s-expression: a list whose elements are lists or atoms, an atom being a string of
// bytes. It is a value that never changes, so it can be copied and used by several goroutines at
// once. The zero Sexp is no expression at all: it equals only itself, contains nothing, and prints
// as nothing.
//
// Guix keeps keys, signatures and its ACL in this form; it lets Libgcrypt read and print them.
// (Libgcrypt Reference Manual, "S-expressions".)
type Sexp struct {
	// enc is the canonical encoding of the expression. It is flat, so parsing takes one allocation
	// and equality is that of bytes; it is read by walking over it. Whatever fills it in guarantees
	// that it is well-formed.
	enc []byte
}

// ParseSexp parses the first list in text, ignoring what follows it. White space may precede it.
//
// It reads what Libgcrypt reads, canonical and "advanced" notation mixed: tokens, "strings" with C
// escapes, #hexadecimal#, |base64|, and 5:bytes, each being only another spelling of the same atom.
// Four things that Libgcrypt lets pass are errors here, for no program writes them: a [display
// hint], a length before another notation (5"bytes"), a list that does not stand first, and the
// empty list as the whole expression. On the other hand, 0: is accepted, which Libgcrypt prints but
// does not read.
//
// Besides such syntax errors, it fails if text is longer than [MaxSexpSize] or if more than 64
// lists are nested.
func ParseSexp(text []byte) (Sexp, error) {
	if len(text) > MaxSexpSize {
		return Sexp{}, fmt.Errorf("s-expression of %d bytes exceeds the limit of %d", len(text), MaxSexpSize)
	}
	p := sexpParser{text: text, out: make([]byte, 0, len(text)+16)}
	if err := p.list(); err != nil {
		return Sexp{}, fmt.Errorf("s-expression: %w at offset %d", err, p.pos)
	}
	if len(p.out) == len("()") {
		return Sexp{}, errors.New("s-expression: the list is empty")
	}
	return Sexp{p.out}, nil
}

// parseFile parses the text of a file as ParseSexp does. Guile, which writes such files character
// by character, each of which stands for a byte, does that in the encoding of its locale; so what
// is UTF-8 is read as such, and else bytes are what they are.
func parseFile(text []byte) (Sexp, error) {
	if b, ok := bytesOfCharacters(text); ok {
		text = b
	}
	return ParseSexp(text)
}

// bytesOfCharacters returns the bytes that the characters of a text in UTF-8 stand for, each for
// one (ISO 8859-1). It fails if there are other characters, or the text is none.
func bytesOfCharacters(text []byte) ([]byte, bool) {
	plain := true
	for _, c := range text {
		plain = plain && c < utf8.RuneSelf
	}
	if plain {
		return text, true
	}
	b := make([]byte, 0, len(text))
	for len(text) > 0 {
		r, n := utf8.DecodeRune(text)
		if r > 0xff { // as is utf8.RuneError
			return nil, false
		}
		b = append(b, byte(r))
		text = text[n:]
	}
	return b, true
}

// sexpParser turns text into its canonical encoding.
type sexpParser struct {
	text []byte
	pos  int
	out  []byte
}

var (
	errUnbalanced = errors.New("a list is not closed")
	errTruncated  = errors.New("an atom is cut short")
	errEscape     = errors.New("unknown escape in a string")
)

// list reads text up to the end of the first list.
func (p *sexpParser) list() error {
	depth := 0
	for p.pos < len(p.text) {
		c := p.text[p.pos]
		switch class[c] {
		case classSpace:
			p.pos++
			continue
		case classOpen:
			if depth == maxSexpDepth {
				return fmt.Errorf("more than %d nested lists", maxSexpDepth)
			}
			depth++
			p.pos++
			p.out = append(p.out, '(')
			continue
		}
		if depth == 0 {
			return fmt.Errorf("found %q instead of a list", c)
		}
		var err error
		start := len(p.out)
		switch class[c] {
		case classClose:
			p.pos++
			p.out = append(p.out, ')')
			if depth--; depth == 0 {
				return nil
			}
			continue
		case classToken:
			p.token()
		case classDigit:
			err = p.verbatim()
		default:
			p.pos++
			switch c {
			case '"':
				err = p.quoted()
			case '#':
				err = p.hexadecimal()
			case '|':
				err = p.base64()
			default:
				p.pos--
				err = fmt.Errorf("unexpected character %q", c)
			}
		}
		if err != nil {
			return err
		}
		p.out = prefixLength(p.out, start)
	}
	if depth == 0 {
		return errors.New("no list")
	}
	return errUnbalanced
}

// The methods below read one atom in one notation each, starting after its opening character if it
// has one, and append its bytes to p.out.

func (p *sexpParser) token() {
	start := p.pos
	for p.pos < len(p.text) && (class[p.text[p.pos]] == classToken || class[p.text[p.pos]] == classDigit) {
		p.pos++
	}
	p.out = append(p.out, p.text[start:p.pos]...)
}

func (p *sexpParser) verbatim() error {
	n, start := 0, p.pos
	for ; p.pos < len(p.text) && class[p.text[p.pos]] == classDigit; p.pos++ {
		// More than there can be is enough to know.
		n = min(n*10+int(p.text[p.pos]-'0'), MaxSexpSize+1)
	}
	if p.pos == len(p.text) || p.text[p.pos] != ':' {
		return errors.New("a number is not followed by a colon")
	}
	if p.text[start] == '0' && p.pos-start > 1 {
		return errors.New("a length starts with zero")
	}
	p.pos++
	if n > len(p.text)-p.pos {
		return errTruncated
	}
	p.out = append(p.out, p.text[p.pos:p.pos+n]...)
	p.pos += n
	return nil
}

func (p *sexpParser) quoted() error {
	for p.pos < len(p.text) {
		c := p.text[p.pos]
		p.pos++
		switch c {
		case '"':
			return nil
		case '\\':
			var err error
			if c, err = p.escape(); err != nil {
				return err
			}
		}
		p.out = append(p.out, c)
	}
	return errTruncated
}

// escape reads what follows a backslash in a string.
func (p *sexpParser) escape() (byte, error) {
	rest := p.text[p.pos:]
	if len(rest) == 0 {
		return 0, errTruncated
	}
	c := rest[0]
	if i := bytes.IndexByte([]byte(`btvnfr"'\`), c); i >= 0 {
		p.pos++
		return "\b\t\v\n\f\r\"'\\"[i], nil
	}
	digits, base := 3, 8
	if c == 'x' {
		p.pos++
		rest, digits, base = rest[1:], 2, 16
	}
	if len(rest) < digits {
		return 0, errTruncated
	}
	v, err := strconv.ParseUint(string(rest[:digits]), base, 8)
	if err != nil {
		return 0, errEscape
	}
	p.pos += digits
	return byte(v), nil
}

func (p *sexpParser) hexadecimal() error {
	n := bytes.IndexByte(p.text[p.pos:], '#')
	if n < 0 {
		return errTruncated
	}
	start := len(p.out)
	for _, c := range p.text[p.pos : p.pos+n] {
		if class[c] != classSpace {
			p.out = append(p.out, c)
		}
	}
	length, err := hex.Decode(p.out[start:], p.out[start:])
	if err != nil {
		return fmt.Errorf("malformed number: %w", err)
	}
	p.out = p.out[:start+length]
	p.pos += n + 1
	return nil
}

func (p *sexpParser) base64() error {
	n := bytes.IndexByte(p.text[p.pos:], '|')
	if n < 0 {
		return errTruncated
	}
	digits := p.text[p.pos : p.pos+n]
	// Go's decoder would skip line ends.
	if n == 0 || bytes.ContainsAny(digits, "\r\n") {
		return errors.New("malformed base64")
	}
	encoding := base64.RawStdEncoding
	if n%4 == 0 {
		encoding = base64.StdEncoding
	}
	out, err := encoding.AppendDecode(p.out, digits)
	if err != nil {
		return errors.New("malformed base64")
	}
	p.out = out
	p.pos += n + 1
	return nil
}

// prefixLength makes an atom of the bytes of out from start on.
func prefixLength(out []byte, start int) []byte {
	var buf [24]byte
	prefix := append(strconv.AppendInt(buf[:0], int64(len(out)-start), 10), ':')
	out = append(out, prefix...)
	copy(out[start+len(prefix):], out[start:])
	copy(out[start:], prefix)
	return out
}

// Classes of characters.
const (
	classOther = iota
	classSpace
	classOpen
	classClose
	classDigit
	classToken // all that a token may contain, apart from digits
)

var class [256]byte

func init() {
	for _, c := range []byte(" \t\n\v\f\r") {
		class[c] = classSpace
	}
	for _, c := range []byte("-./_:*+=") {
		class[c] = classToken
	}
	for i := range byte(26) {
		class['a'+i], class['A'+i] = classToken, classToken
	}
	for i := range byte(10) {
		class['0'+i] = classDigit
	}
	class['('], class[')'] = classOpen, classClose
}
