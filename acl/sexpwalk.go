// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"strconv"
)

// Find returns the first list inside s, s itself included, whose first element is the atom name, in
// the order of the text. It reports whether there is one. This is how Guix takes signatures and
// keys apart. (Libgcrypt, gcry_sexp_find_token.)
func (s Sexp) Find(name string) (Sexp, bool) {
	for i := 0; i < len(s.enc); {
		switch s.enc[i] {
		case '(':
			if atom, _, ok := cutAtom(s.enc[i+1:]); ok && string(atom) == name {
				return Sexp{s.enc[i : i+elementLen(s.enc[i:])]}, true
			}
			i++
		case ')':
			i++
		default:
			i += elementLen(s.enc[i:])
		}
	}
	return Sexp{}, false
}

// Equal reports whether s and t are the same expression. How their texts spelt the atoms does not
// matter.
func (s Sexp) Equal(t Sexp) bool {
	return bytes.Equal(s.enc, t.enc)
}

// AppendCanonical appends the canonical encoding of s, which has a length before each atom and no
// white space, to dst and returns the extended slice. Equal expressions have equal encodings, and
// no others have.
func (s Sexp) AppendCanonical(dst []byte) []byte {
	return append(dst, s.enc...)
}

// elements returns a cursor before the first element of s, which has none if s is not a list.
func (s Sexp) elements() cursor {
	if len(s.enc) == 0 || s.enc[0] != '(' {
		return cursor{}
	}
	return cursor{s.enc[1 : len(s.enc)-1]}
}

// named returns a cursor after the first element of s, and reports whether s is a list whose first
// element is the atom name.
func (s Sexp) named(name string) (cursor, bool) {
	c := s.elements()
	atom, ok := c.atom()
	return c, ok && string(atom) == name
}

// cursor walks over the elements of a list.
type cursor struct {
	rest []byte
}

// done reports whether no element is left.
func (c *cursor) done() bool { return len(c.rest) == 0 }

// next takes the next element, if there is one.
func (c *cursor) next() (Sexp, bool) {
	if c.done() {
		return Sexp{}, false
	}
	n := elementLen(c.rest)
	s := Sexp{c.rest[:n:n]}
	c.rest = c.rest[n:]
	return s, true
}

// atom takes the next element if it is an atom.
func (c *cursor) atom() (atom []byte, ok bool) {
	atom, rest, ok := cutAtom(c.rest)
	if ok {
		c.rest = rest
	}
	return atom, ok
}

// field takes the next element if it is a list of the form (name VALUE), VALUE being an atom.
func (c *cursor) field() (name, value []byte, ok bool) {
	saved := *c
	list, _ := c.next()
	elements := list.elements()
	if name, ok = elements.atom(); ok {
		if value, ok = elements.atom(); ok && elements.done() {
			return name, value, true
		}
	}
	*c = saved
	return nil, nil, false
}

// fields takes all elements that are left, which must be lists (name VALUE), one for each of names,
// in any order. It returns the values in the order of names.
func (c *cursor) fields(values [][]byte, names ...string) bool {
	seen := 0
	for !c.done() {
		name, value, ok := c.field()
		if !ok {
			return false
		}
		i := 0
		for i < len(names) && names[i] != string(name) {
			i++
		}
		if i == len(names) || values[i] != nil {
			return false
		}
		// Not nil, even if the value is empty.
		values[i] = value[:len(value):len(value)]
		seen++
	}
	return seen == len(names)
}

// cutAtom splits enc after the atom that it starts with, if it does.
func cutAtom(enc []byte) (atom, rest []byte, ok bool) {
	n, i := 0, 0
	for ; i < len(enc) && class[enc[i]] == classDigit; i++ {
		n = n*10 + int(enc[i]-'0')
	}
	if i == 0 {
		return nil, enc, false
	}
	end := i + 1 + n
	return enc[i+1 : end : end], enc[end:], true
}

// elementLen returns the length of the element that enc starts with.
func elementLen(enc []byte) int {
	depth, i := 0, 0
	for {
		switch enc[i] {
		case '(':
			depth++
			i++
		case ')':
			depth--
			i++
		default:
			_, rest, _ := cutAtom(enc[i:])
			i = len(enc) - len(rest)
		}
		if depth == 0 {
			return i
		}
	}
}

// The functions below build canonical encodings.

// appendAtom appends an atom to the encoding dst.
func appendAtom[T string | []byte](dst []byte, atom T) []byte {
	dst = strconv.AppendInt(dst, int64(len(atom)), 10)
	dst = append(dst, ':')
	return append(dst, atom...)
}

// list returns the list of an atom and further elements.
func list(name string, elements ...Sexp) Sexp {
	enc := appendAtom([]byte{'('}, name)
	for _, e := range elements {
		enc = append(enc, e.enc...)
	}
	return Sexp{append(enc, ')')}
}

// field returns the list of two atoms.
func field[T string | []byte](name string, value T) Sexp {
	return list(name, Sexp{appendAtom(nil, value)})
}
