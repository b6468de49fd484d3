// SPDX-License-Identifier: GPL-3.0-or-later

package publish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
)

// subdirectory makes a directory below that of the export, which may be on a medium that somebody
// has prepared: a link there that leads elsewhere is an error.
func (e *exporter) subdirectory(name string) error {
	root, err := os.OpenRoot(e.o.Directory)
	if err != nil {
		return err
	}
	defer root.Close()
	if err = root.MkdirAll(name, 0o755); err == nil {
		_, err = root.Stat(name)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", e.o.Directory, err)
	}
	return err
}

// needsNar reports whether the nar of an item is written: a narinfo has to name one, and those that
// the server has may be out of reach for others.
func (e *exporter) needsNar(it *exportItem) bool { return e.o.Nars || len(it.elsewhere()) == 0 }

// writeNar writes the nar of an item of which the tree is at hand, and returns where.
func (e *exporter) writeNar(ctx context.Context, it *exportItem, tree string) (narinfo.URL, error) {
	// A question mark can stand neither in a path of a URL nor in a name of FAT.
	name := strings.ReplaceAll(filepath.Base(it.narinfo.StorePath), "?", "_")
	u := narinfo.URL{URL: "nar/zstd/" + name, Compression: "zstd", SizeKnown: true}
	if err := e.subdirectory(filepath.Dir(u.URL)); err != nil {
		return u, err
	}
	err := files.Replace(filepath.Join(e.o.Directory, u.URL), 0o644, files.Options{Sync: true, Locked: true}, func(w io.Writer) error {
		n := &skipper{w: w}
		err := writeNar(nar.Until(ctx, n), tree, u.Compression)
		u.FileSize = uint64(n.offset)
		return err
	})
	e.done.Bytes += int64(u.FileSize)
	return u, err
}

// elsewhere returns the nars that whoever gets the narinfo can have from a server.
func (it *exportItem) elsewhere() (urls []narinfo.URL) {
	for _, u := range it.narinfo.PreferredURLs() {
		// Without a server, what is relative is of no use.
		address, err := narinfo.ResolveURL(cmp.Or(it.server, "file:"), u.URL)
		if scheme, _, _ := strings.Cut(strings.ToLower(address), ":"); err == nil && (scheme == "http" || scheme == "https") {
			u.URL = address
			urls = append(urls, u)
		}
	}
	return urls
}

// listed returns the narinfo of an item as it is in the directory: the signed part as it was
// signed, and below it the given nars, or else those that are elsewhere, and one line more, if that
// is not empty. Nars that the signature covers, as that of no server of Guix does, stay what they
// are.
func listed(it *exportItem, urls []narinfo.URL, line string) string {
	var text strings.Builder
	signed, _ := it.narinfo.SignedText()
	text.WriteString(signed)
	drop := false
	for l := range strings.Lines(strings.TrimRight(it.narinfo.Text()[len(signed):], "\n")) {
		if strings.TrimSpace(l) == "" {
			break // the record ends
		}
		if name, _, ok := strings.Cut(l, ":"); ok && l[0] != '+' {
			drop = slices.Contains([]string{"URL", "Compression", "FileSize", "FileHash", "ERIS", "Delta"}, name)
		}
		if !drop {
			text.WriteString(strings.TrimSuffix(l, "\n") + "\n")
		}
	}
	if len(urls) == 0 {
		urls = it.elsewhere()
	}
	for _, u := range urls {
		text.WriteString(u.Text())
	}
	if line != "" {
		text.WriteString(line + "\n")
	}
	return text.String()
}

// capabilityLine returns the line of a narinfo for a read capability; empty if the signed part has
// it.
func capabilityLine(n *narinfo.Narinfo, c eris.ReadCapability) string {
	for _, e := range n.ERIS {
		if had, err := eris.ParseURN(e.URN); err == nil && had == c && e.Signed {
			return ""
		}
	}
	return narinfo.ERIS{URN: c.URN()}.Text()
}

// Narinfos returns the signed narinfos of items that there are, by hash part, as an [ExportServer]
// has them: for items that no server has.
func (s *Server) Narinfos(ctx context.Context, hashParts []string) (map[string][]byte, error) {
	texts := map[string][]byte{}
	for _, hashPart := range hashParts {
		item, err := s.item(ctx, hashPart)
		if errors.Is(err, ErrNoItem) {
			continue
		} else if err != nil {
			return texts, err
		}
		text, err := s.sign(item, nil)
		if err != nil {
			return texts, err
		}
		texts[hashPart] = []byte(text)
	}
	return texts, nil
}
