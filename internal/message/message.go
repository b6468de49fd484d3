// SPDX-License-Identifier: GPL-3.0-or-later

// Package message tells people what is wrong, in words that need no knowledge of the program, and
// what to do; it owns the exit statuses of commands.
package message

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
)

// A Status is the exit status of a command. As an error it stands for what has been told already.
type Status int

// The exit statuses of commands that people run, which the help describes.
const (
	Failed       Status = 1
	BadUsage     Status = 2
	Unavailable  Status = 3
	Unauthorised Status = 4
	Unreachable  Status = 5
)

// unread is the exit status when nobody reads what is printed, which needs no words: what shells
// make of the signal that would have ended the command.
const unread = 128 + int(syscall.SIGPIPE)

// Error implements error.
func (s Status) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// Err returns the status as an error, nil if it is 0.
func (s Status) Err() error {
	if s == 0 {
		return nil
	}
	return s
}

// failure is an error that says with which status the command ends.
type failure struct {
	error
	status Status
}

// Unwrap returns the error.
func (f failure) Unwrap() error { return f.error }

// Errorf returns an error, made as by [fmt.Errorf], with which a command ends with the status.
func (s Status) Errorf(format string, a ...any) error { return failure{fmt.Errorf(format, a...), s} }

// Usage returns the error that something is wrong with a command line.
func Usage(format string, a ...any) error { return BadUsage.Errorf(format, a...) }

// OfUsage returns an error as one of the command line; none stays none.
func OfUsage(err error) error {
	if err == nil {
		return nil
	}
	return failure{err, BadUsage}
}

// Report shows the error of a command that a person runs, if there is one that has not been told,
// and what to do, if that is known. After "\nhint: ", the error may say so itself. It returns the
// exit status, which depends on what the error wraps.
func Report(err error) int {
	var told Status
	var at *fs.PathError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &told):
		return int(told)
	case errors.As(err, &at) && at.Path == os.Stdout.Name() && at.Err == syscall.EPIPE:
		return unread
	}
	text, h, ok := strings.Cut(err.Error(), "\nhint: ")
	if !ok {
		h = hint(err)
	}
	text = fmt.Sprintf("guix-substitute-eris: error: %.*s\n", longestText, Text(text))
	if h != "" {
		text += fmt.Sprintf("hint: %.*s\n", longestText, h)
	}
	io.WriteString(os.Stderr, page.Wrap(2, text))
	return int(statusOf(err))
}

// longestText is how much is shown of an error, in characters: a name may have any length.
const longestText = 4000

func statusOf(err error) Status {
	var f failure
	var op *net.OpError
	switch {
	case errors.As(err, &f):
		return f.status
	case errors.As(err, new(*storeurl.Error)), errors.As(err, new(*net.AddrError)):
		return BadUsage
	case errors.As(err, &op) && op.Op == "listen":
	case errors.Is(err, eris.ErrNotFound):
		return Unavailable
	case op != nil, errors.As(err, new(*mirror.ServerError)), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return Unreachable
	}
	return Failed
}

// Plain is an error in the words of people who do not know in what the program is written.
func Plain(err error) string { return Text(err.Error()) }

// Text does the same with a text, of which each line is an error of its own. It says everything
// once.
func Text(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		for _, r := range rewordings() {
			line = r.ReplaceAllString(line, r.words)
		}
		if !strings.Contains(line, "not found") && !strings.Contains(line, "hash") {
			line = ofBlock().ReplaceAllString(line, "")
		}
		lines[i] = once(line)
	}
	return strings.Join(slices.Compact(lines), "\n  ")
}

// rewordings are what stands for texts of the libraries, in the order in which they are looked for.
var rewordings = sync.OnceValue(func() (list []rewording) {
	for _, w := range [...]struct{ pattern, words string }{
		{`(?:\b\w+ )?\S*\.incoming(?:/[0-9a-f]+)?: `, ""}, // which nobody has named
		{`\.new-[A-Z2-7]{26}/?`, ""},
		{`\b(?:dial|read|write) (?:tcp|udp|unix|unixgram)[46]? (?:\S+->)?(\S+): `, "$1: "},
		{`(^|: |\()(?:lstat|stat|open|openat|fstatat|mkdir|mkdirat|readlink|remove|unlinkat|create|statfs|lchown) (.+?): `, "$1$2: "},
		{`(^|: |\()(?:read|write) (\S*/\S*|\S+: is a directory)(: |$)`, "$1$2$3"},
		{`\blisten (?:tcp|udp|unix)[46]? (?:address )?(\S+): `, "$1: "},
		{`\blisten (?:tcp|udp|unix)[46]?: (?:address|lookup) (\S+)(?: on \S+)?: `, "$1: "},
		{`\b(?:connect|bind): `, ""},
		{`\b(?:recvfrom|read|write): connection `, "connection "},
		{`\bdial tcp: lookup (\S+)(?: on \S+)?: `, "$1: "},
		{`(the address right\?) (?:\S+): `, "$1 "}, // which the URL has
		{`failed to WebSocket dial: failed to send handshake request: Get "\S*": `, ""},
		{`http: server gave HTTP response to HTTPS client`, "it speaks HTTP, and not HTTPS"},
		{`http2: .* looked like an HTTP/1\.1 header`, "it speaks HTTP/1.1 only, and no h2c"},
		{`tls: first record does not look like a TLS handshake`, "it does not speak TLS"},
		{`failed to WebSocket dial: expected handshake response status code 101 but got (\d+)`, "it speaks HTTP, but no WebSocket is there: status $1"},
		{`(does not exist; .*): file does not exist$`, "$1"},
		{`(?:net/http: HTTP/1.x transport connection broken: malformed|readLoopPeekFailLocked: ).*`, "it speaks something else than HTTP"},
		{`net/http: HTTP/1.x transport connection broken: `, ""},
		{`context canceled|\w+ signal received`, "interrupted"},
		{`\bgetwd: no such file or directory`, "the working directory is gone"},
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
		list = append(list, rewording{regexp.MustCompile(w.pattern), w.words})
	}
	return list
})

type rewording struct {
	*regexp.Regexp
	words string
}

// ofBlock is what the parts of an error begin with that are the same with any block.
var ofBlock = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`\b(?:getting )?block [A-Z2-7]{52}: `)
})

// once removes the parts of an error that an earlier part has said.
func once(line string) string {
	var parts []string
	for part := range strings.SplitSeq(line, ": ") {
		said := func(p string) bool {
			return p == part || strings.HasSuffix(p, " "+part) || strings.HasSuffix(p, ":"+part) || strings.HasSuffix(p, strconv.Quote(part)) || strings.HasPrefix(part, "/") && strings.HasSuffix(p, "file://"+part)
		}
		if !slices.ContainsFunc(parts, said) {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}

// hint says what to do about an error, or nothing: the first of these that fits.
func hint(err error) string {
	text := err.Error()
	has := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(text, part) })
	}
	is := func(causes ...error) bool {
		return slices.ContainsFunc(causes, func(cause error) bool { return errors.Is(err, cause) })
	}
	for _, h := range [...]struct {
		fits bool
		hint string
	}{
		{has("is \"serve\" running", "make it, or", "see --", "is a server running", "/dev/stdout: no space"), ""}, // it says so itself, or nothing stays
		{is(syscall.ECONNREFUSED) || has("connection refused"), "nothing listens there; is the address right, and the program that serves it running?"},
		{is(syscall.EADDRINUSE), "end that program, or choose another port or socket by --listen or --socket"},
		{is(syscall.EADDRNOTAVAIL), "this machine has no such address; \"ip address\" shows those that it has"},
		{is(syscall.ENETUNREACH, syscall.EHOSTUNREACH) || has("no such host", "network is unreachable"), "is the name right, and has this machine a network?"},
		{has("getwd: "), "change to another directory by cd"},
		{is(syscall.ENOTDIR), "a file is where a directory must be; name another place"},
		{has("invalid port"), "a port is a number from 1 to 65535"},
		{is(syscall.ENOSPC, syscall.EDQUOT), "make room; blocks that are stored already stay, so that the next attempt goes on from there"},
		{is(syscall.EFBIG), "the file system holds no file as large, which is 4 GiB on FAT32; name a place on another one"},
		{is(syscall.EROFS), "mount it so that it can be written to, or name another place"},
		{has("/…/", "symlink ") && is(fs.ErrExist, fs.ErrNotExist, syscall.EINVAL, syscall.EPERM, syscall.ENOSYS, syscall.EOPNOTSUPP), "the file system there may hold no links, or not all names, as those of sticks; name a place on another one"},
		{is(fs.ErrPermission), "do it as a user who may, root for example, or name another place"},
		{has("tls: first record", "server gave HTTP response", "looked like an HTTP/1.1", "the answer is not HTTP", "malformed HTTP", "readLoopPeekFailLocked", "failed to WebSocket dial: expected"), "something else is served there; are the scheme and the port of the URL right?"},
		{has("s3://") && has("403 Forbidden: "), "are AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION those of the bucket, and is the clock of this machine right?"},
		{is(fetch.ErrReadOnly) && has(": ipfs+"), "blocks are put by the RPC of a node, whose port is 5001; or say ?rpc in the URL"},
		{is(fetch.ErrReadOnly) || has("4.05", "403 Forbidden"), "whoever serves the store must permit it: serve --listen='URL?get&put', or its socket"},
		{has("its bytes do not have this hash"), "the store is damaged; \"check --repair URN --store=URL --store=OTHER-URL\" puts the right bytes there"},
		{is(eris.ErrNotFound), "no store that was asked has it; is the URN copied whole? \"check URN\" says what is missing; name other stores by --store"},
		{has("does not belong to the private key"), "--public-key and --private-key take the two files of one pair, signing-key.pub and signing-key.sec"},
		{has("public key: ") && !has("the key: "), "--public-key takes a file as \"keygen\" makes it, signing-key.pub"}, // which is not an option's
		{has("private key: "), "--private-key takes a file as \"keygen\" makes it, signing-key.sec"},
		{has("read capability: "), "a read capability is urn:eris: and 106 letters and digits, in capitals; copy it whole"},
		{has("missing port in address", "too many colons in address"), "write --listen=127.0.0.1:8080, or --listen=:8080 for all addresses of this machine"},
		{is(fs.ErrExist), "choose another name, or move what is there away"},
		{is(context.DeadlineExceeded, os.ErrDeadlineExceeded), "is the address right, and can the machine be reached?"},
		{has("other users may write to it"), "chmod go-w takes that from them; a file system without modes, as of sticks, is mounted with umask=022"},
		{is(syscall.ENOLCK), "the file system has no locks; name a place on another one"},
		{has("something else than a socket"), "move it away, or choose another --socket"},
		{has("in use by another process", "another server listens on it"), "end that program, or choose another --directory or --socket"},
		{is(fs.ErrNotExist) && !has("\"") && !has("database"), "is the name right?"},
	} {
		if h.fits {
			return h.hint
		}
	}
	return ""
}

// Unknown says that there is no command, option or setting of a name, and which one may be meant.
func Unknown(thing, name string, known []string) string {
	text := fmt.Sprintf("there is no %s %q", thing, name)
	if name == "" || len(name) > longestName {
		return text
	}
	all := cobra.Command{SuggestionsMinimumDistance: min(3, max(1, len(strings.TrimLeft(name, "-"))/3))}
	for _, k := range known {
		all.AddCommand(&cobra.Command{Use: k, Run: func(*cobra.Command, []string) {}})
	}
	if meant := all.SuggestionsFor(name); len(meant) > 0 {
		text += fmt.Sprintf("; did you mean %q?", meant[0])
	}
	return text
}

// longestName is how long a name may be for which similar ones are looked for, in bytes.
const longestName = 64

// OfStore says what is wrong with a store, which the caller names.
func OfStore(url string, err error) string {
	text := strings.TrimPrefix(err.Error(), url+": ")
	return Text(regexp.MustCompile(`^block [A-Z2-7]{52}: `).ReplaceAllString(text, ""))
}

// NoArguments is a [cobra.PositionalArgs] for commands that take none.
func NoArguments(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := ""
	c.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.Type() != "bool" && f.NoOptDefVal != "" && f.Value.String() == f.NoOptDefVal {
			hint = fmt.Sprintf("\nhint: what --%[1]s may be given stands behind an equals sign: --%[1]s=%[2]s", f.Name, args[0])
		}
	})
	return Usage("%s takes no arguments, and %q was given%s", c.Name(), args[0], hint)
}

// UnknownCommand says that there is no command of a name.
func UnknownCommand(name string, names []string) error {
	return Usage("%s\nhint: \"guix-substitute-eris --help\" shows the commands; those of guix are run by \"guix %s\"",
		Unknown("command", name, names), name)
}

// Option says in our words what is wrong with an option.
func Option(c *cobra.Command, err error) error {
	text := err.Error()
	if unknown, ok := errors.AsType[*pflag.NotExistError](err); ok {
		var names []string
		c.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, "--"+f.Name) })
		name := "--" + unknown.GetSpecifiedName()
		if unknown.GetSpecifiedShortnames() != "" {
			name = "-" + unknown.GetSpecifiedName()
		}
		text = Unknown("option", name, names)
	} else if missing, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		value, _ := pflag.UnquoteUsage(missing.GetFlag())
		text = fmt.Sprintf("the option --%[1]s needs a value: --%[1]s=%[2]s", missing.GetFlag().Name, value)
	} else if invalid, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		why := fmt.Sprint(errors.Unwrap(invalid))
		if invalid.GetFlag().Value.Type() == "bool" {
			why = "it must be true or false, or be left out"
		}
		text = fmt.Sprintf("the option --%s has the value %q: %s", invalid.GetFlag().Name, invalid.GetValue(), why)
		if strings.Contains(why, strconv.Quote(invalid.GetValue())) {
			text = fmt.Sprintf("the option --%s: %s", invalid.GetFlag().Name, why)
		}
	}
	return Usage("%s\nhint: \"%s --help\" shows the options", text, c.CommandPath())
}
