// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
)

// The exit statuses of commands that people run, which the help describes.
const (
	statusFailed       = 1
	statusUsage        = 2
	statusUnavailable  = 3
	statusUnauthorised = 4
	statusUnreachable  = 5
)

// errUnavailable is wrapped by errors that say that something is nowhere to be had.
var errUnavailable = errors.New("not available")

// fail shows an error of a command that a person runs, and what to do, if that is known. It returns
// the exit status, which depends on what the format wraps.
func fail(format string, a ...any) int {
	err := fmt.Errorf(format, a...)
	text, h, ok := strings.Cut(err.Error(), "\nhint: ")
	if !ok {
		h = hint(err)
	}
	fmt.Fprintf(os.Stderr, "guix-substitute-eris: error: %s\n", plainText(text))
	if h != "" {
		fmt.Fprintf(os.Stderr, "hint: %s\n", h)
	}
	var op *net.OpError
	var server *mirror.ServerError
	switch {
	case errors.As(err, &op) && op.Op == "listen":
	case errors.Is(err, eris.ErrNotFound), errors.Is(err, errUnavailable):
		return statusUnavailable
	case op != nil, errors.As(err, &server), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrDeadlineExceeded):
		return statusUnreachable
	}
	return statusFailed
}

// usageError shows what is wrong with a command line.
func usageError(format string, a ...any) int {
	fail(format, a...)
	return statusUsage
}

// plain is an error in the words of people who do not know in what the program is written.
func plain(err error) string { return plainText(err.Error()) }

// plainText does the same with a text, of which each line is an error of its own. It says
// everything once.
func plainText(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		for _, w := range [...]struct{ pattern, words string }{
			{`\b(?:dial|read|write) (?:tcp|udp|unix|unixgram)[46]? (?:\S+->)?(\S+): `, "$1: "},
			{`\b(?:lstat|stat|open|openat|fstatat|mkdir|mkdirat|readlink|remove|unlinkat|create|statfs) (\S+): `, "$1: "},
			{`\b(?:read|write) (\S*/\S*): `, "$1: "},
			{`\blisten (?:tcp|udp|unix)[46]? (?:address )?(\S+): `, "$1: "},
			{`\blisten (?:tcp|udp|unix)[46]?: (?:address|lookup) (\S+): `, "$1: "},
			{`\b(?:connect|bind): `, ""},
			{`context canceled`, "interrupted"},
			{`context deadline exceeded|i/o timeout`, "no answer in time"},
			{`address already in use`, "another program listens there"},
			{`missing port in address`, "the port is missing"},
			{`too many colons in address`, "this is not of the form HOST:PORT"},
			{`incompatible types: TOML value has type (\w+); destination has type (\w+)`, "it is of the type $1, and must be of the type $2"},
			{`\btype (?:slice|\[\]string)\b`, "type list"},
			{`\btype int(?:eger|64)?\b`, "type number"},
			{`\btype bool(?:ean)?\b`, "type true or false"},
			{`^toml: `, ""},
		} {
			line = regexp.MustCompile(w.pattern).ReplaceAllString(line, w.words)
		}
		if !strings.Contains(line, "not found") && !strings.Contains(line, "hash") {
			line = regexp.MustCompile(`\bblock [A-Z2-7]{52}: `).ReplaceAllString(line, "") // the same with any block
		}
		lines[i] = once(line)
	}
	return strings.Join(slices.Compact(lines), "\n  ")
}

// once removes the parts of an error that an earlier part has said.
func once(line string) string {
	var parts []string
	for part := range strings.SplitSeq(line, ": ") {
		said := func(p string) bool {
			return p == part || strings.HasSuffix(p, " "+part) || strings.HasPrefix(part, "/") && strings.HasSuffix(p, "file://"+part)
		}
		if !slices.ContainsFunc(parts, said) {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}

// hint says what to do about an error, or nothing.
func hint(err error) string {
	text := err.Error()
	has := func(part string) bool { return strings.Contains(text, part) }
	switch {
	case has("is \"serve\" running"), has("make it, or"), has("see --"), has("is a server running"):
		return "" // it says so itself
	case errors.Is(err, syscall.ECONNREFUSED), has("connection refused"):
		return "nothing listens there; is the address right, and the program that serves it running?"
	case errors.Is(err, syscall.EADDRINUSE):
		return "end that program, or choose another port or socket by --listen or --socket"
	case errors.Is(err, syscall.ENOSPC):
		return "make room; blocks that are stored already stay, so that the next attempt goes on from there"
	case errors.Is(err, fetch.ErrReadOnly), has("4.05"), has("403 Forbidden"):
		return "whoever serves the store must permit it: serve --listen='URL?get&put', or its socket"
	case errors.Is(err, eris.ErrNotFound):
		return "no store that was asked has it; name others by --store or " + storeVariable
	case has("no list \"private-key\""):
		return "--private-key takes the other file of the pair, signing-key.sec"
	case has("Base32"), has("does not start with urn:eris:"):
		return "a read capability is urn:eris: and 106 letters and digits, in capitals; copy it whole, and give it before the destination"
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return "do it as a user who may, root for example, or name another place"
	case has("missing port in address"), has("too many colons in address"):
		return "write --listen=127.0.0.1:8080, or --listen=:8080 for all addresses of this machine"
	case errors.Is(err, fs.ErrExist):
		return "choose another name, or move what is there away"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "is the address right, and can the machine be reached?"
	case has("in use by another process"), has("another server listens on it"), has("something else than a socket"):
		return "end that program, or choose another --directory or --socket"
	case errors.Is(err, fs.ErrNotExist) && !has("\""):
		return "is the name right?"
	}
	return ""
}

// optionError says in our words what the package flag has found wrong.
func optionError(flags *flag.FlagSet, err error) string {
	text := err.Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		return unknown("option", "--"+strings.TrimLeft(name, "-"), optionNames(flags))
	}
	if name, ok := strings.CutPrefix(text, "flag needs an argument: -"); ok {
		name = strings.TrimLeft(name, "-")
		value, _ := flag.UnquoteUsage(flags.Lookup(name))
		return fmt.Sprintf("the option --%[1]s needs a value: --%[1]s=%[2]s", name, strings.ToUpper(value))
	}
	m := regexp.MustCompile(`^invalid (?:boolean )?value ("(?:[^"\\]|\\.)*") for (?:flag )?-([\w-]+): (.*)$`).FindStringSubmatch(text)
	if m == nil {
		return text
	}
	why := m[3]
	if g, ok := flags.Lookup(m[2]).Value.(flag.Getter); ok && strings.Contains(why, "parse error") || why == "value out of range" {
		switch g.Get().(type) {
		case time.Duration:
			why = "it must be a time with a unit, like 90s, 15m or 36h"
		case bool:
			why = "it must be true or false, or be left out"
		default:
			why = "it must be a number"
		}
	}
	return fmt.Sprintf("the option --%s has the value %s: %s", m[2], m[1], why)
}

func optionNames(flags *flag.FlagSet) (names []string) {
	flags.VisitAll(func(f *flag.Flag) { names = append(names, "--"+f.Name) })
	return names
}

// unknown says that there is no command, option or setting of a name, and which one may be meant.
func unknown(thing, name string, known []string) string {
	text := fmt.Sprintf("there is no %s %q", thing, name)
	best, least := "", min(3, max(1, len(strings.TrimLeft(name, "-"))/3))
	for _, k := range known {
		d := distance(name, k)
		if strings.HasPrefix(k, name) && len(name) > 3 {
			d = 1
		}
		if d <= least && (best == "" || d < least) {
			best, least = k, d
		}
	}
	if best != "" {
		text += fmt.Sprintf("; did you mean %q?", best)
	}
	return text
}

// distance is how many letters have to be added, removed, changed or swapped with the next one to
// make one word of another.
func distance(a, b string) int {
	const most = 64
	a, b = a[:min(len(a), most)], b[:min(len(b), most)]
	var d [most + 1][most + 1]int
	for i := range len(a) + 1 {
		for j := range len(b) + 1 {
			switch {
			case i == 0 || j == 0:
				d[i][j] = i + j
				continue
			case a[i-1] == b[j-1]:
				d[i][j] = d[i-1][j-1]
			default:
				d[i][j] = 1 + min(d[i-1][j-1], d[i-1][j], d[i][j-1])
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}

// settingNames are the settings of the configuration file.
func settingNames() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[configuration]()) {
		names = append(names, f.Tag.Get("toml"))
	}
	return names
}
