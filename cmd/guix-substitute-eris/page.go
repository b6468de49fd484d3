// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
)

// A page is a text for people, in lines that are no longer than the terminal is wide.
type page struct {
	strings.Builder
	columns int
	unicode bool
}

// usualColumns is the width of a page where nothing else is known, and for a wide terminal.
const usualColumns = 80

func newPage() *page {
	p := &page{columns: usualColumns, unicode: unicode()}
	if width, _, err := term.GetSize(1); err == nil && width > 0 {
		p.columns = min(width, usualColumns)
	}
	if width, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && width > 0 {
		p.columns = width
	}
	p.columns = max(p.columns, 40)
	return p
}

// mark begins a line: that all is well, that something is not, or neither.
type mark int

const (
	note mark = iota
	good
	bad
	arrow
)

func (p *page) mark(m mark) string {
	if p.unicode {
		return [...]string{"·", "✓", "✗", "→"}[m]
	}
	return [...]string{"-", "ok", "!!", "=>"}[m]
}

// say adds a paragraph that begins with a mark, with further lines below the text.
func (p *page) say(indent int, m mark, format string, a ...any) {
	p.paragraph(strings.Repeat(" ", indent)+p.mark(m)+" ", fmt.Sprintf(format, a...))
}

// line adds a paragraph.
func (p *page) line(indent int, format string, a ...any) {
	p.paragraph(strings.Repeat(" ", indent), fmt.Sprintf(format, a...))
}

// heading adds a line with an empty one before it.
func (p *page) heading(text string) {
	p.WriteByte('\n')
	p.line(0, "%s", text)
}

// command adds a command to be copied, which is in one line whatever its length.
func (p *page) command(indent int, text string) {
	fmt.Fprintf(p, "%*s%s\n", indent, "", p.clean(text))
}

const (
	// longestWord is how many characters words have that are no names.
	longestWord = 40
	// shortestName is how many characters of a name are of use.
	shortestName = 32
)

// paragraph adds words after a prefix. What is too long for a line, and a long name that does not
// fit into the rest of one, is shortened in its middle.
func (p *page) paragraph(prefix, text string) {
	room := p.columns - utf8.RuneCountInString(prefix)
	used := 0
	p.WriteString(prefix)
	for _, word := range strings.Fields(p.clean(text)) {
		most := room
		if left := room - used - 1; used > 0 && left >= shortestName && utf8.RuneCountInString(word) > longestWord {
			most = left
		}
		word = p.shorten(word, most)
		n := utf8.RuneCountInString(word)
		switch {
		case used == 0:
		case used+1+n > room:
			p.WriteString("\n" + strings.Repeat(" ", utf8.RuneCountInString(prefix)))
			used = 0
		default:
			p.WriteByte(' ')
			used++
		}
		p.WriteString(word)
		used += n
	}
	p.WriteByte('\n')
}

// shorten takes the middle out of a word of more than most characters.
func (p *page) shorten(word string, most int) string {
	runes := []rune(word)
	if len(runes) <= most {
		return word
	}
	gap := "..."
	if p.unicode {
		gap = "…"
	}
	keep := most - utf8.RuneCountInString(gap)
	return string(runes[:keep-keep/3]) + gap + string(runes[len(runes)-keep/3:])
}

// clean replaces what may have come from anybody and does not belong on a terminal.
func (p *page) clean(text string) string {
	if !p.unicode {
		text = strings.ReplaceAll(text, "…", "...")
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError || !p.unicode && r >= 0x7f || !strconv.IsPrint(r):
			return '?'
		}
		return r
	}, text)
}

// shownSize is a number of bytes for people.
func shownSize(n int64) string {
	switch {
	case n < 0:
		return "unknown size"
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1e6:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	case n < 1e9:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.1f GB", float64(n)/1e9)
}

// count is a number of things, with the plural that most words have.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
