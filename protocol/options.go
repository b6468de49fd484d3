// SPDX-License-Identifier: GPL-3.0-or-later

package protocol

import (
	"strconv"
	"strings"
)

// Options are what the daemon tells its substituter about the settings of the administrator and of
// the client, by name: the variable _NIX_OPTIONS (Guix, nix/libstore/globals.cc: Settings::pack).
// The nil Options are those of a program that no daemon has started.
type Options map[string]string

// maxOptions is how many options are kept; the daemon sends about twenty.
const maxOptions = 4096

// ParseOptions reads the value of _NIX_OPTIONS: NAME=VALUE lines. Other lines are passed over, and
// so is what repeats a name.
func ParseOptions(packed string) Options {
	o := Options{}
	for line := range strings.SplitSeq(packed, "\n") {
		name, value, ok := strings.Cut(line, "=")
		if _, twice := o[name]; ok && !twice && len(o) < maxOptions {
			o[name] = value
		}
	}
	return o
}

// fromClient returns what the client wants, be it trusted or not, before what the administrator has
// set (Guix, guix/scripts/substitute.scm: find-daemon-option "untrusted-…").
func (o Options) fromClient(name string) (string, bool) {
	v, ok := o["untrusted-"+name]
	if !ok {
		v, ok = o[name]
	}
	return v, ok
}

// SubstituteURLs returns the substitute URLs in order, and whether the daemon has set them. A
// client may ask for none at all, which is an empty list.
func (o Options) SubstituteURLs() ([]string, bool) {
	v, ok := o.fromClient("substitute-urls")
	return strings.Fields(v), ok
}

// UntrustedURLs reports whether the substitute URLs are those of a client that the daemon does not
// trust: any user of the machine.
func (o Options) UntrustedURLs() bool {
	_, ok := o["untrusted-substitute-urls"]
	return ok
}

// Discover reports whether servers found on the local network are to be asked too.
func (o Options) Discover() bool {
	return o["discover"] == "true"
}

// Traces reports whether the client wants the events of a download as lines that it can read
// (“extended build traces”) rather than as text for people.
func (o Options) Traces() bool {
	v, _ := o.fromClient("print-extended-build-trace")
	n, err := strconv.Atoi(v)
	return err == nil && n > 0
}

// Columns returns the width of a progress line in characters: one less than that of the client's
// terminal, at least 20, and 80 if the client has not told.
func (o Options) Columns() int {
	v, _ := o.fromClient("terminal-columns")
	n, err := strconv.Atoi(v)
	if err != nil {
		return 80
	}
	return min(max(20, n-1), 1000)
}

// Deduplicate reports whether files are to be shared with equal ones of the store.
func (o Options) Deduplicate() bool {
	return o["deduplicate"] == "yes"
}
