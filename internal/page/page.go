// SPDX-License-Identifier: GPL-3.0-or-later

// Package page shows results to people: text in lines that are no longer than the terminal is wide,
// and the same as JSON.
package page

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/term"
)

// A Page is a text for people, in lines that are no longer than the terminal is wide.
type Page struct {
	strings.Builder
	columns int
	unicode bool
}

// usualColumns is the width of a page where nothing else is known, and for a wide terminal.
const usualColumns = 80

// New returns an empty page for standard output; the variable COLUMNS counts more than its width.
func New() *Page { return &Page{columns: columnsOf(1, usualColumns), unicode: Unicode()} }

// columnsOf returns how wide lines on a descriptor may be, off a terminal as usual.
func columnsOf(descriptor, usual int) int {
	if width, _, err := term.GetSize(descriptor); err == nil && width > 0 {
		usual = min(width, usualColumns)
	}
	if width, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && width > 0 {
		usual = width
	}
	return max(usual, 40)
}

// Wrap returns a text for a descriptor in lines that are no longer than its terminal is wide, the
// further ones indented. Words are whole, and so are lines off a terminal unless COLUMNS is set.
// What does not belong on a terminal is replaced: names of files may come from anybody.
func Wrap(descriptor int, text string) string {
	columns := columnsOf(descriptor, math.MaxInt32)
	var b strings.Builder
	for line := range strings.Lines(text) {
		plain := strings.TrimSuffix(line, "\n")
		fill(&b, strings.Split(clean(plain, true), " "), columns, 0, 2)
		b.WriteString(line[len(plain):])
	}
	return b.String()
}

// fill adds words to lines of some columns, of which the first has some used already and further
// ones are indented.
func fill(b *strings.Builder, words []string, columns, used, indent int) {
	for i, word := range words {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case used+1+n > columns:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			used = indent
		default:
			b.WriteByte(' ')
			used++
		}
		b.WriteString(word)
		used += n
	}
}

// Print prints the page on standard output.
func (p *Page) Print() error {
	_, err := io.WriteString(os.Stdout, p.String())
	return err
}

// A Teller prints what a command says while it works, which goes on where nobody can be told. It
// must not be used by several goroutines at a time.
type Teller struct{ err error }

// Say prints on standard output, at once.
func (t *Teller) Say(format string, a ...any) {
	_, err := fmt.Printf(format, a...)
	t.err = cmp.Or(t.err, err)
}

// Err returns the first error of Say, or nil.
func (t *Teller) Err() error { return t.err }

// A Mark begins a line.
type Mark int

const (
	Note  Mark = iota // neither well nor not
	Good              // all is well
	Bad               // something is not
	Arrow             // what follows from it
)

// Say adds a paragraph that begins with a mark, with further lines below the text.
func (p *Page) Say(indent int, m Mark, format string, a ...any) {
	marks := [...]string{"-", "ok", "!!", "=>"}
	if p.unicode {
		marks = [...]string{"·", "✓", "✗", "→"}
	}
	p.paragraph(strings.Repeat(" ", indent)+marks[m]+" ", fmt.Sprintf(format, a...))
}

// Line adds a paragraph.
func (p *Page) Line(indent int, format string, a ...any) {
	p.paragraph(strings.Repeat(" ", indent), fmt.Sprintf(format, a...))
}

// Item adds a paragraph that begins with its number in a list, with further lines below the text.
func (p *Page) Item(indent, number int, format string, a ...any) {
	p.paragraph(fmt.Sprintf("%*s%d. ", indent, "", number), fmt.Sprintf(format, a...))
}

// Heading adds a line with an empty one before it.
func (p *Page) Heading(text string) {
	p.WriteByte('\n')
	p.Line(0, "%s", text)
}

// Command adds a command to be copied, which is in one line whatever its length.
func (p *Page) Command(indent int, text string) {
	fmt.Fprintf(p, "%*s%s\n", indent, "", p.clean(text))
}

// paragraph adds words after a prefix. What is too long for a line is shortened in its middle.
func (p *Page) paragraph(prefix, text string) {
	indent := utf8.RuneCountInString(prefix)
	p.WriteString(prefix)
	words := strings.Fields(p.clean(text))
	for i, word := range words {
		words[i] = p.shorten(word, p.columns-indent)
	}
	fill(&p.Builder, words, p.columns, indent, indent)
	p.WriteByte('\n')
}

// shorten takes the middle out of a word of more than most characters.
func (p *Page) shorten(word string, most int) string {
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

func (p *Page) clean(text string) string { return clean(text, p.unicode) }

// Clean replaces what may have come from anybody and does not belong on a terminal.
func Clean(text string) string { return clean(text, Unicode()) }

func clean(text string, unicode bool) string {
	if !unicode {
		text = strings.ReplaceAll(text, "…", "...")
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError || !unicode && r >= 0x7f || !strconv.IsPrint(r):
			return '?'
		}
		return r
	}, text)
}

// Size is a number of bytes for people.
func Size(n int64) string {
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

// Count is a number of things, with the plural that most words have.
func Count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// Unicode reports whether the locale has other characters than ASCII.
func Unicode() bool {
	for _, variable := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if value := os.Getenv(variable); value != "" {
			value = strings.ToLower(value)
			return strings.Contains(value, "utf-8") || strings.Contains(value, "utf8")
		}
	}
	return false
}

// Duration is a time for people, of at least a millisecond.
func Duration(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", max(d.Milliseconds(), 1))
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// Quote returns a word of a command as the shell wants it.
func Quote(word string) string {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("/._-+=:,@%", r)
	}
	if word != "" && strings.TrimLeftFunc(word, plain) == "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// JSON prints a result on standard output.
func JSON(v any) error {
	e := json.NewEncoder(Escaped{os.Stdout})
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// Escaped writes JSON with escapes for all characters that do not belong on a terminal: packages
// that make JSON have them for those of ASCII only. Each write must be of whole characters.
type Escaped struct{ io.Writer }

// Write implements io.Writer.
func (e Escaped) Write(text []byte) (int, error) {
	var b strings.Builder
	for _, r := range string(text) {
		if r < 0x7f || strconv.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.AppendRune(nil, r) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	_, err := io.WriteString(e.Writer, b.String())
	return len(text), err
}
