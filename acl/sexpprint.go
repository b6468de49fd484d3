// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"fmt"
	"strings"
)

// String returns s as Libgcrypt prints it, in the "advanced" notation, over several lines and with
// a line feed at the end. Guix writes its key files, its ACL and the signatures of narinfos like
// that, and this function gives the same bytes. (Libgcrypt, gcry_sexp_sprint with
// GCRYSEXP_FMT_ADVANCED.) There is one exception: an atom that looks like text in ISO 8859-1, as
// one number in some thousands does, Libgcrypt prints as a string, which readers take for what it
// is only if they expect the same character encoding. Here it is hexadecimal.
//
// The result is ASCII, and safe to show on a terminal.
func (s Sexp) String() string {
	return s.print(true)
}

// oneLine returns s in the "advanced" notation on one line.
func (s Sexp) oneLine() string {
	return s.print(false)
}

func (s Sexp) print(lines bool) string {
	if len(s.enc) == 0 {
		return ""
	}
	var b strings.Builder
	b.Grow(2 * len(s.enc))
	depth := 0
	newLine := func() {
		if lines {
			b.WriteByte('\n')
			for range depth {
				b.WriteByte(' ')
			}
		}
	}
	enc := s.enc
	for len(enc) > 0 {
		switch enc[0] {
		case '(':
			// The blank after an atom stays at the end of the line, even where a list follows on
			// the next one.
			if depth > 0 {
				newLine()
			}
			b.WriteByte('(')
			depth++
			enc = enc[1:]
		case ')':
			b.WriteByte(')')
			depth--
			enc = enc[1:]
			if len(enc) > 0 && enc[0] != '(' {
				newLine()
			} else if len(enc) > 0 && !lines {
				b.WriteByte(' ')
			}
		default:
			var atom []byte
			atom, enc, _ = cutAtom(enc)
			printAtom(&b, atom)
			if len(enc) > 0 && enc[0] != ')' {
				b.WriteByte(' ')
			}
		}
	}
	if lines {
		b.WriteByte('\n')
	}
	return b.String()
}

// printAtom writes an atom in the notation that Libgcrypt chooses for it: as a token if it can be
// one; as a string if it looks like text; and else in hexadecimal, which includes everything that
// would be a negative number or has a leading zero byte, and here what is not ASCII.
func printAtom(b *strings.Builder, atom []byte) {
	text, token := true, true
	for i, c := range atom {
		switch {
		case c >= 0x20 && c < 0x7f:
		case strings.IndexByte("\b\t\v\n\f\r", c) >= 0:
		default:
			text = false
		}
		if class[c] != classToken && (class[c] != classDigit || i == 0) {
			token = false
		}
	}
	switch {
	case !text:
		fmt.Fprintf(b, "#%X#", atom)
	case token && len(atom) > 0:
		b.Write(atom)
	default:
		b.WriteByte('"')
		for _, c := range atom {
			if i := strings.IndexByte("\b\t\v\n\f\r\"'\\", c); i >= 0 {
				b.WriteByte('\\')
				c = `btvnfr"'\`[i]
			}
			b.WriteByte(c)
		}
		b.WriteByte('"')
	}
}
