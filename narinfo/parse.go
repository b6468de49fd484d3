// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
)

// Bounds on what [Parse] accepts.
const (
	// MaxSize is the length of the longest narinfo, in bytes. A reference takes about 60 bytes, the
	// rest of a narinfo about 1000.
	MaxSize = 1 << 20
	// MaxReferences is the largest number of references.
	MaxReferences = 16384
	// MaxURLs is the largest number of fields URL.
	MaxURLs = 64

	maxERIS   = 16
	maxDeltas = 16
	// maxDeltaURL is the length of the longest URL of a delta that is used, in bytes.
	maxDeltaURL = 4096
)

// ErrNoField is the error of [Parse] about a field that is missing, which quotes nothing else.
var ErrNoField = errors.New("narinfo: no field")

// signatureField is what ends the signed part of a narinfo.
const signatureField = "Signature:"

// Parse parses a narinfo: UTF-8 text of lines NAME:VALUE. White space before a value is dropped,
// white space after it, a carriage return for instance, is part of it. A line that starts with "+"
// continues the value before, one that starts with "#" is a comment. Empty lines may come first; a
// later one ends the record, and what follows is not read. If a field occurs twice, the first one
// counts, except for URL, Compression, FileSize, ERIS and Delta. The n-th field Compression belongs
// to the n-th field URL, wherever they stand, and so does the n-th FileSize; but if there are more
// or fewer of that than URLs, each belongs to the URL before it, for `guix publish` leaves out what
// it does not know. Unknown fields are ignored. (Guix, guix/records.scm: recutils->alist; Guix,
// guix/narinfo.scm: read-narinfo, narinfo-preferred-uris.)
//
// Parse fails if text exceeds [MaxSize], [MaxReferences] or [MaxURLs] or is not UTF-8, if a line is
// of no kind named above, if StorePath or References is missing or malformed or NarSize malformed,
// and if there is no URL with a supported compression (see [Narinfo.PreferredURLs]).
//
// A narinfo without a good NarHash is enough to know that an item is available; [Narinfo.CheckHash]
// reports whether there is more to it. That the narinfo is the one that was asked for must be
// checked with [Narinfo.CheckItem], and whether to believe it with [Narinfo.Authorise].
func Parse(text []byte) (*Narinfo, error) {
	if len(text) > MaxSize {
		return nil, fmt.Errorf("narinfo: %d bytes exceed the limit of %d", len(text), MaxSize)
	}
	all := string(text)
	p := parser{lines: lines{text: all, rest: all}, signedEnd: -1, n: &Narinfo{}, first: map[string]int{}}
	if !utf8.ValidString(p.text) {
		return nil, errors.New("narinfo: the text is not UTF-8")
	}
	// The field must start a line: else the last signed value and the signature would run into one
	// another.
	if i := strings.Index(p.text, signatureField); i == 0 || i > 0 && p.text[i-1] == '\n' {
		p.signedEnd = i
	}
	for {
		f, err := p.next()
		if err != nil {
			return nil, fmt.Errorf("narinfo: line %d: %w", p.line, err)
		}
		if f.name == "" {
			break
		}
		if err := p.field(f); err != nil {
			return nil, fmt.Errorf("narinfo: field %s in line %d: %w", f.name, f.line, err)
		}
	}
	return p.finish()
}

// parser collects fields.
type parser struct {
	lines
	signedEnd int // start of the field Signature, or −1

	n     *Narinfo       // which keeps nothing of the parser
	first map[string]int // where the first one stands of each of the six kinds of which one counts

	compressions []string
	sizes        []fileSize
}

// fileSize is a field FileSize.
type fileSize struct {
	value string
	urls  int // how many URLs stand before it
}

// field takes in one field.
func (p *parser) field(f field) error {
	n := p.n
	switch f.name {
	case "StorePath", "NarHash", "NarSize", "References", "Deriver", "Signature":
		if _, twice := p.first[f.name]; twice {
			return nil
		}
		p.first[f.name] = f.offset
	}
	switch f.name {
	case "StorePath":
		n.StorePath = f.value
		dir, base := cutBase(f.value)
		if !strings.HasPrefix(dir, "/") {
			return fmt.Errorf("%.300q is not an absolute file name", f.value)
		}
		return CheckStoreName(base)
	case "NarHash":
		n.NarHash = f.value
	case "NarSize":
		var err error
		if n.NarSize, err = strconv.ParseUint(f.value, 10, 64); err != nil {
			return fmt.Errorf("%.300q is not a decimal number below 2^64", f.value)
		}
		n.NarSizeKnown = true
	case "References":
		n.References = strings.Fields(f.value)
		if len(n.References) > MaxReferences {
			return fmt.Errorf("%d references exceed the limit of %d", len(n.References), MaxReferences)
		}
		for _, r := range n.References {
			if err := checkReference(r); err != nil {
				return err
			}
		}
	case "Deriver":
		if CheckStoreName(f.value) == nil {
			n.Deriver = f.value
		}
	case "Signature":
		n.Signature = f.value
	case "URL":
		if len(n.URLs) == MaxURLs {
			return fmt.Errorf("more than %d URLs", MaxURLs)
		}
		n.URLs = append(n.URLs, URL{URL: f.value})
	case "Compression":
		p.compressions = append(p.compressions, f.value)
	case "FileSize":
		p.sizes = append(p.sizes, fileSize{f.value, len(n.URLs)})
	case "ERIS":
		if len(n.ERIS) < maxERIS {
			e := parseERIS(f.value)
			e.Signed = f.offset < p.signedEnd
			n.ERIS = append(n.ERIS, e)
		}
	case "Delta":
		if d, ok := parseDelta(f.value); ok && len(n.Deltas) < maxDeltas {
			d.Signed = f.offset < p.signedEnd
			n.Deltas = append(n.Deltas, d)
		}
	}
	return nil
}

// finish checks that all is there, and decides what is signed.
func (p *parser) finish() (*Narinfo, error) {
	for _, name := range []string{"StorePath", "References"} {
		if _, ok := p.first[name]; !ok {
			return nil, fmt.Errorf("%w %s", ErrNoField, name)
		}
	}
	n := p.n
	n.hashError = decodeNarHash(&n.NarDigest, n.NarHash)
	if len(n.URLs) == 0 {
		return nil, fmt.Errorf("%w URL", ErrNoField)
	}
	p.pair()
	if !slices.ContainsFunc(n.URLs, URL.usable) {
		return nil, errors.New("narinfo: no well-formed URL with a supported compression")
	}
	n.text = p.text
	// The signature may also stand behind the end of the record.
	_, signed := p.first["Signature"]
	for _, name := range []string{"StorePath", "NarHash", "References"} {
		offset, ok := p.first[name]
		signed = signed && ok && offset < p.signedEnd
	}
	if signed {
		n.signed = p.signedEnd
		return n, nil
	}
	for i := range n.ERIS {
		n.ERIS[i].Signed = false
	}
	for i := range n.Deltas {
		n.Deltas[i].Signed = false
	}
	return n, nil
}

// pair gives each URL the compression and the size that belong to it.
func (p *parser) pair() {
	urls := p.n.URLs
	for i, c := range p.compressions[:min(len(p.compressions), len(urls))] {
		urls[i].Compression = c
	}
	for i, s := range p.sizes {
		if len(p.sizes) != len(urls) {
			i = s.urls - 1
		}
		if i < 0 || urls[i].SizeKnown {
			continue
		}
		// A hint for people and for the choice among URLs: one that makes no sense is no reason to
		// give up the narinfo.
		if size, err := strconv.ParseUint(s.value, 10, 64); err == nil {
			urls[i].FileSize, urls[i].SizeKnown = size, true
		}
	}
}

// hashPrefix stands before the digits in a NarHash.
const hashPrefix = "sha256:"

func decodeNarHash(digest *[32]byte, s string) error {
	digits, ok := strings.CutPrefix(s, hashPrefix)
	if s == "" {
		return errors.New("no field NarHash")
	}
	if !ok {
		return fmt.Errorf("%.300q does not start with \"sha256:\"", s)
	}
	if len(digits) == 2*len(digest) {
		return fmt.Errorf("%.300q is not in nix-base32; hexadecimal is not understood", s)
	}
	if err := nixbase32.Decode(digest[:], digits); err != nil {
		return fmt.Errorf("%.300q: %w", s, err)
	}
	return nil
}

// field is a field of a record. The name is not empty.
type field struct {
	name, value string
	offset      int // of the name in the text
	line        int // counted from 1
}

// lines divides a text into fields.
type lines struct {
	text, rest string
	line       int // the last one that was taken, counted from 1
	any        bool
}

// take takes the next line, without its end.
func (l *lines) take() (line string) {
	line, l.rest, _ = strings.Cut(l.rest, "\n")
	l.line++
	return line
}

// next returns the next field, a field without a name at the end of the record.
func (l *lines) next() (field, error) {
	for l.rest != "" {
		offset := len(l.text) - len(l.rest)
		line := l.take()
		switch {
		case line == "" && l.any:
			return field{}, nil
		case line == "" || line[0] == '#':
			continue
		case line[0] == '+':
			return field{}, errors.New("it continues a field, but there is none before")
		case !startsField(line):
			return field{}, fmt.Errorf("%.300q is neither a field nor a comment", line)
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return field{}, fmt.Errorf("%.300q has no colon", line)
		}
		l.any = true
		f := field{name, strings.TrimLeftFunc(value, unicode.IsSpace), offset, l.line}
		l.continuation(&f)
		return f, nil
	}
	return field{}, nil
}

// startsField reports whether the first character of a line makes it a field.
func startsField(line string) bool {
	r, _ := utf8.DecodeRuneInString(line)
	return unicode.IsLower(r) || unicode.IsUpper(r) || r == '%'
}

// continuation takes the lines that continue f, and comments among them.
func (l *lines) continuation(f *field) {
	var value []byte
	for l.rest != "" && (l.rest[0] == '+' || l.rest[0] == '#') {
		line := l.take()
		if line[0] == '#' {
			continue
		}
		if value == nil {
			value = append(value, f.value...)
		}
		value = append(value, '\n')
		value = append(value, strings.TrimPrefix(line[1:], " ")...)
	}
	if value != nil {
		f.value = string(value)
	}
}
