// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"fmt"
	"slices"
	"strings"
)

// String returns a list as Libgcrypt prints it, in the "advanced" notation, over several lines and
// with a line feed at the end. Guix writes its key files, its ACL and the signatures of narinfos
// like that, and this function gives the same bytes. (Libgcrypt, gcry_sexp_sprint with
// GCRYSEXP_FMT_ADVANCED.) There is one exception: an atom that looks like text in ISO 8859-1, as
// one number in some thousands does, Libgcrypt prints as a string, which readers take for what it
// is only if they expect the same character encoding. Here it is hexadecimal.
//
// The result is ASCII, and safe to show on a terminal.
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
