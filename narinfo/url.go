// SPDX-License-Identifier: GPL-3.0-or-later

package narinfo

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// URL is a place where the nar of a store item can be had: a field URL with the fields that belong
// to it.
type URL struct {
	// URL is the value of the field, absolute or relative; see [ResolveURL].
	URL string
	// Compression is the name of the method by which the nar is compressed, empty if none was
	// given, in which case the URL cannot be used.
	Compression string
	// FileSize is the length in bytes of what the URL yields, if SizeKnown; else it is 0.
	FileSize  uint64
	SizeKnown bool
}

// Text returns the lines for a narinfo.
func (u URL) Text() string {
	text := "URL: " + u.URL + "\nCompression: " + u.Compression + "\n"
	if u.SizeKnown {
		text += "FileSize: " + strconv.FormatUint(u.FileSize, 10) + "\n"
	}
	return text
}

// usable reports whether the URL can be tried.
func (u URL) usable() bool {
	_, supported := slowness[u.Compression]
	return supported && u.URL != "" && len(u.URL) <= maxURLLength && badURLByte(u.URL) < 0
}

// maxURLLength is the length of the longest URL that is used, in bytes.
const maxURLLength = 4096

// badURLByte returns the offset of the first byte that no URL may contain, or −1.
func badURLByte(s string) int {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// PreferredURLs returns the URLs that can be used, in the order of the time that decompression
// takes, and else in that of the narinfo. Left out are those with a compression that is not
// supported, with blanks, control characters or other than ASCII characters, those of more than
// 4096 bytes, and all but the first eight of the rest, for each may take as long as a silent server
// is waited for. A parsed narinfo has at least one. (Guix, guix/narinfo.scm:
// narinfo-preferred-uris.)
func (n *Narinfo) PreferredURLs() []URL {
	urls := slices.DeleteFunc(slices.Clone(n.URLs), func(u URL) bool { return !u.usable() })
	slices.SortStableFunc(urls, func(u, v URL) int { return cmp.Compare(slowness[u.Compression], slowness[v.Compression]) })
	return urls[:min(len(urls), maxPreferred)]
}

// maxPreferred is how many URLs of a narinfo are used: one for each method and some to spare.
const maxPreferred = 8

// slowness ranks methods by the time that decompression takes.
var slowness = map[string]int{"none": 0, "zstd": 0, "gzip": 1, "lzip": 2, "xz": 3, "bzip2": 3}

// ResolveURL returns the absolute URL of a nar, given the URL of the substitute server, base, and
// the value of a field URL. A value that starts with a scheme is absolute; any other is appended to
// base, with a slash between them unless base ends with one. Nothing else is changed: neither dot
// segments nor percent signs are interpreted. (Guix, guix/narinfo.scm: narinfo-maker.)
//
// It fails if value is empty or contains blanks, control characters or other than ASCII characters.
// Base may have such, as the name of a directory, and a password, which no error shows. It does not
// look at the scheme: an unsigned narinfo can name any, "file" for instance, so the caller must.
func ResolveURL(base, value string) (string, error) {
	if value == "" {
		return "", errors.New("empty URL in a narinfo")
	}
	if i := badURLByte(value); i >= 0 {
		return "", fmt.Errorf("the URL %.300q contains the byte %#02x", value, value[i])
	}
	if !hasScheme(value) {
		value = strings.TrimSuffix(base, "/") + "/" + value
	}
	return value, nil
}

// hasScheme reports whether s starts with a URI scheme and a colon (RFC 3986, section 3.1).
func hasScheme(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z':
		case i > 0 && ('0' <= c && c <= '9' || c == '+' || c == '-' || c == '.'):
		default:
			return i > 0 && c == ':'
		}
	}
	return false
}
