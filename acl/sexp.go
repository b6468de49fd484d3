// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// MaxSexpSize is the length, in bytes, of the longest text that the parsers of this package
	// accept. An entry of an ACL takes about 150 bytes.
	MaxSexpSize = 1 << 20

	// maxSexpDepth bounds how deep lists may be nested. A signature has four levels, an ACL five.
	maxSexpDepth = 64

	// maxSexpElements bounds how many atoms and lists there may be, each of which takes up to 200
	// bytes of memory. The longest ACL has 100 000.
	maxSexpElements = 1 << 18
)

// A sexp is an s-expression: an atom, which is a string of bytes, or a list of expressions. It
// never changes. Guix keeps keys, signatures and its ACL in this form; it lets Libgcrypt read and
// print them. (Libgcrypt Reference Manual, "S-expressions".)
type sexp struct {
	atom []byte // nil for a list
	list []sexp
}

// parseSexp parses the first list in text, ignoring what follows it. White space may precede it. It
// reads what Libgcrypt reads, canonical and "advanced" notation mixed: tokens, "strings" with C
// escapes, #hexadecimal#, |base64|, and 5:bytes, each being only another spelling of the same atom.
// Four things that Libgcrypt lets pass are errors here, for no program writes them: a [display
// hint], a length before another notation (5"bytes"), a list that does not stand first, and the
// empty list as the whole expression. 0: is accepted, which Libgcrypt prints but does not read.
func parseSexp(text []byte) (sexp, error) {
	if len(text) > MaxSexpSize {
		return sexp{}, fmt.Errorf("s-expression of %d bytes exceeds the limit of %d", len(text), MaxSexpSize)
	}
	p := sexpParser{rest: text}
	p.skip(isSpace)
	var s sexp
	var err error
	switch {
	case len(p.rest) == 0:
		err = errors.New("no list")
	case p.rest[0] != '(':
		err = fmt.Errorf("found %q instead of a list", p.rest[0])
	default:
		s, err = p.element(1)
	}
	if err != nil {
		return sexp{}, fmt.Errorf("s-expression: %w at offset %d", err, len(text)-len(p.rest))
	}
	if len(s.list) == 0 {
		return sexp{}, errors.New("s-expression: the list is empty")
	}
	return s, nil
}

// parseFile parses the text of a file as parseSexp does. Guile, which writes such files character
// by character, each of which stands for a byte, does that in the encoding of its locale; so what
// is UTF-8 is read as such, and else bytes are what they are.
func parseFile(text []byte) (sexp, error) {
	if b, ok := bytesOfCharacters(text); ok {
		text = b
	}
	return parseSexp(text)
}

// bytesOfCharacters returns the bytes that the characters of a text in UTF-8 stand for, each for
// one (ISO 8859-1). It fails if there are other characters, or the text is none.
func bytesOfCharacters(text []byte) ([]byte, bool) {
	if utf8.RuneCount(text) == len(text) && utf8.Valid(text) {
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

func isSpace(c byte) bool { return c == ' ' || '\t' <= c && c <= '\r' }

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// inToken reports whether a token may contain a character. It does not begin with a digit.
func inToken(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || isDigit(c) || strings.IndexByte("-./_:*+=", c) >= 0
}

var (
	errUnbalanced = errors.New("a list is not closed")
	errTruncated  = errors.New("an atom is cut short")
	errEscape     = errors.New("unknown escape in a string")
)

// A sexpParser reads expressions from the start of what is left of a text.
type sexpParser struct {
	rest     []byte
	elements int // so far
}

// skip skips characters of a kind, and returns them.
func (p *sexpParser) skip(kind func(c byte) bool) []byte {
	n := 0
	for n < len(p.rest) && kind(p.rest[n]) {
		n++
	}
	skipped := p.rest[:n]
	p.rest = p.rest[n:]
	return skipped
}

// element reads a list that is so deep, or an atom in it.
func (p *sexpParser) element(depth int) (s sexp, err error) {
	if p.elements++; p.elements > maxSexpElements {
		return s, fmt.Errorf("more than %d elements", maxSexpElements)
	}
	if p.rest[0] != '(' {
		s.atom, err = p.atom()
		return s, err
	}
	if depth > maxSexpDepth {
		return s, fmt.Errorf("more than %d nested lists", maxSexpDepth)
	}
	p.rest = p.rest[1:]
	s.list = make([]sexp, 0, 3)
	for {
		p.skip(isSpace)
		switch {
		case len(p.rest) == 0:
			return s, errUnbalanced
		case p.rest[0] == ')':
			p.rest = p.rest[1:]
			return s, nil
		}
		e, err := p.element(depth + 1)
		if err != nil {
			return s, err
		}
		s.list = append(s.list, e)
	}
}

// atom reads an atom in any notation. What it returns is not nil.
func (p *sexpParser) atom() (atom []byte, err error) {
	c := p.rest[0]
	switch {
	case isDigit(c):
		return p.verbatim()
	case inToken(c):
		return p.skip(inToken), nil
	case c == '"':
		p.rest = p.rest[1:]
		return p.quoted()
	case c != '#' && c != '|':
		return nil, fmt.Errorf("unexpected character %q", c)
	}
	text, after, ok := bytes.Cut(p.rest[1:], p.rest[:1])
	switch {
	case !ok:
		return nil, errTruncated
	case c == '#':
		atom, err = hexadecimal(text)
	default:
		atom, err = fromBase64(text)
	}
	p.rest = after
	return atom, err
}

// verbatim reads an atom after its length and a colon.
func (p *sexpParser) verbatim() ([]byte, error) {
	length := p.skip(isDigit)
	if len(p.rest) == 0 || p.rest[0] != ':' {
		return nil, errors.New("a number is not followed by a colon")
	}
	if length[0] == '0' && len(length) > 1 {
		return nil, errors.New("a length starts with zero")
	}
	n, err := strconv.Atoi(string(length))
	if err != nil || n >= len(p.rest) {
		return nil, errTruncated
	}
	atom := p.rest[1 : 1+n]
	p.rest = p.rest[1+n:]
	return atom, nil
}

// quoted reads a string after its opening quotation mark.
func (p *sexpParser) quoted() ([]byte, error) {
	atom := []byte{}
	for len(p.rest) > 0 {
		c := p.rest[0]
		p.rest = p.rest[1:]
		switch c {
		case '"':
			return atom, nil
		case '\\':
			var err error
			if c, err = p.escape(); err != nil {
				return nil, err
			}
		}
		atom = append(atom, c)
	}
	return nil, errTruncated
}

// In a string, characters of escaped are written as a backslash and one of escapes.
const (
	escaped = "\b\t\v\n\f\r\"'\\"
	escapes = `btvnfr"'\`
)

// escape reads what follows a backslash in a string.
func (p *sexpParser) escape() (byte, error) {
	if len(p.rest) == 0 {
		return 0, errTruncated
	}
	c := p.rest[0]
	if i := strings.IndexByte(escapes, c); i >= 0 {
		p.rest = p.rest[1:]
		return escaped[i], nil
	}
	digits, base := 3, 8
	if c == 'x' {
		p.rest = p.rest[1:]
		digits, base = 2, 16
	}
	if len(p.rest) < digits {
		return 0, errTruncated
	}
	v, err := strconv.ParseUint(string(p.rest[:digits]), base, 8)
	if err != nil {
		return 0, errEscape
	}
	p.rest = p.rest[digits:]
	return byte(v), nil
}

func hexadecimal(text []byte) ([]byte, error) {
	atom, err := hex.AppendDecode([]byte{}, text)
	if err != nil {
		atom, err = hex.AppendDecode([]byte{}, slices.DeleteFunc(slices.Clone(text), isSpace))
	}
	if err != nil {
		return nil, fmt.Errorf("malformed number: %w", err)
	}
	return atom, nil
}

func fromBase64(text []byte) ([]byte, error) {
	encoding := base64.RawStdEncoding
	if len(text)%4 == 0 {
		encoding = base64.StdEncoding
	}
	atom, err := encoding.AppendDecode([]byte{}, text)
	// Go's decoder would skip line ends.
	if err != nil || len(text) == 0 || bytes.ContainsAny(text, "\r\n") {
		return nil, errors.New("malformed base64")
	}
	return atom, nil
}

// find returns the first list inside s, s itself included, whose first element is the atom name, in
// the order of the text. It reports whether there is one. This is how Guix takes signatures and
// keys apart. (Libgcrypt, gcry_sexp_find_token.)
func (s sexp) find(name string) (sexp, bool) {
	if _, ok := s.named(name); ok {
		return s, true
	}
	for _, e := range s.list {
		if found, ok := e.find(name); ok {
			return found, true
		}
	}
	return sexp{}, false
}

// equal reports whether s and t are the same expression. How their texts spelt the atoms does not
// matter.
func (s sexp) equal(t sexp) bool {
	return (s.atom == nil) == (t.atom == nil) && bytes.Equal(s.atom, t.atom) && slices.EqualFunc(s.list, t.list, sexp.equal)
}

// at returns an element of a list, counted from 0. What is none is an empty list.
func (s sexp) at(i int) sexp {
	if i >= len(s.list) {
		return sexp{}
	}
	return s.list[i]
}

// has reports whether s is the list of some atoms.
func (s sexp) has(atoms ...string) bool {
	return slices.EqualFunc(s.list, atoms, func(e sexp, a string) bool { return e.atom != nil && string(e.atom) == a })
}

// named returns the elements of s after the first one, and reports whether s is a list whose first
// element is the atom name, which is not empty.
func (s sexp) named(name string) ([]sexp, bool) {
	if string(s.at(0).atom) != name {
		return nil, false
	}
	return s.list[1:], true
}

// values returns the values of elements, which must be lists (name VALUE), one for each of names,
// in any order. It returns the values in the order of names.
func values(elements []sexp, names ...string) ([][]byte, bool) {
	values := make([][]byte, len(names))
	for _, e := range elements {
		i := slices.Index(names, string(e.at(0).atom))
		if i < 0 || values[i] != nil || len(e.list) != 2 || e.list[1].atom == nil {
			return nil, false
		}
		values[i] = e.list[1].atom
	}
	return values, len(elements) == len(names)
}

// atom returns the atom of some bytes.
func atom[T string | []byte](value T) sexp { return sexp{atom: append([]byte{}, value...)} }

// list returns the list of an atom and further elements.
func list(name string, elements ...sexp) sexp {
	return sexp{list: append([]sexp{atom(name)}, elements...)}
}

// field returns the list of two atoms.
func field[T string | []byte](name string, value T) sexp { return list(name, atom(value)) }

// String returns a list as Libgcrypt prints it, in the "advanced" notation, over several lines and
// with a line feed at the end, as Guix has it in files and signatures (Libgcrypt, gcry_sexp_sprint
// with GCRYSEXP_FMT_ADVANCED); but an atom that looks like text in ISO 8859-1, as one number in
// some thousands does, is not a string, which readers take for what it is only if they expect the
// same character encoding. The result is ASCII, and safe to show on a terminal.
func (s sexp) String() string {
	var b strings.Builder
	s.print(&b, 0, true)
	b.WriteByte('\n')
	return b.String()
}

// oneLine returns s in the "advanced" notation on one line.
func (s sexp) oneLine() string {
	var b strings.Builder
	s.print(&b, 0, false)
	return b.String()
}

// print writes an expression that so many lists are around of.
func (s sexp) print(b *strings.Builder, depth int, lines bool) {
	if s.atom != nil {
		printAtom(b, s.atom)
		return
	}
	newLine := func() {
		if lines {
			b.WriteString("\n" + strings.Repeat(" ", depth+1))
		}
	}
	b.WriteByte('(')
	afterList := false
	for i, e := range s.list {
		// The blank after an atom stays at the end of the line.
		if i > 0 && !(afterList && lines) {
			b.WriteByte(' ')
		}
		if e.atom == nil || afterList {
			newLine()
		}
		e.print(b, depth+1, lines)
		afterList = e.atom == nil
	}
	if afterList {
		newLine()
	}
	b.WriteByte(')')
}

// printAtom writes an atom in the notation that Libgcrypt chooses for it: as a token if it can be
// one; as a string if it looks like text; and else in hexadecimal, which includes everything that
// would be a negative number or has a leading zero byte, and here what is not ASCII.
func printAtom(b *strings.Builder, atom []byte) {
	notText := func(r rune) bool { return (r < 0x20 || r >= 0x7f) && !strings.ContainsRune("\b\t\v\n\f\r", r) }
	text := string(atom)
	switch {
	case strings.ContainsFunc(text, notText):
		fmt.Fprintf(b, "#%X#", atom)
	case text != "" && !isDigit(text[0]) && !slices.ContainsFunc(atom, func(c byte) bool { return !inToken(c) }):
		b.WriteString(text)
	default:
		b.WriteByte('"')
		for _, c := range atom {
			if i := strings.IndexByte(escaped, c); i >= 0 {
				b.WriteByte('\\')
				c = escapes[i]
			}
			b.WriteByte(c)
		}
		b.WriteByte('"')
	}
}
