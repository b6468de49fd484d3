// SPDX-License-Identifier: GPL-3.0-or-later

package inspect

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// Answer says of items in words whether they can be had. The error may be a [message.Status].
func Answer(ctx context.Context, s *session.Settings, items []string) error {
	sub := s.SilentSession(false) // blocks may be the only way
	defer sub.Close()
	p := page.New()
	worst := forItems(ctx, s, sub, items, func(e explanation) message.Status {
		p.Line(0, "%s", e.Path)
		if e.Availability != substitute.Available {
			p.Say(2, page.Bad, "%s: %s", e.Availability, message.Text(e.Reason))
			return session.ExitStatus(e.Availability)
		}
		for _, r := range e.Servers {
			if r.Vouches {
				p.Say(2, page.Good, "%s from %s, signed by %s", e.Availability, r.URL, r.Signer)
				break
			}
		}
		p.Say(2, page.Note, "%s unpacked, %s, %s", page.Size(int64(e.NarSize)), page.Count(e.References, "reference"), e.NarHash)
		return 0
	})
	if worst > 0 && p.Len() > 0 {
		p.Line(0, "\"guix-substitute-eris explain ITEM\" says more.")
	}
	return cmp.Or(p.Print(), worst.Err())
}

// Narinfo is the command that shows what servers say.
func Narinfo() *cobra.Command {
	var s session.Settings
	c := &cobra.Command{
		Use:   "ITEM...",
		Short: "show what the servers say of items",
		Long: `Show the narinfos of store items that the substitute servers have, each below a
line that says which server it is from, and what its signature is worth.`,
	}
	key := c.Flags().Bool("key", false, "show the public key by which the first narinfo that has one is signed, for \"guix archive --authorize\"")
	s.Flags(c.Flags())
	c.RunE = func(_ *cobra.Command, items []string) error {
		if len(items) == 0 {
			return message.Usage("narinfo takes store items: guix-substitute-eris narinfo /gnu/store/…")
		}
		if _, err := Load(&s); err != nil {
			return err
		}
		sub := s.SilentSession(true)
		defer sub.Close()
		var full error
		worst := forItems(c.Context(), &s, sub, items, func(e explanation) message.Status {
			if text := showNarinfos(e, *key); text != "" {
				_, err := io.WriteString(os.Stdout, text)
				full = cmp.Or(full, err)
				return 0
			}
			what := e.Availability
			if what == substitute.Available { // but has no key
				what = substitute.NotAvailable
			}
			fmt.Fprintf(os.Stderr, "%s: %s: %s\n", page.Clean(e.Path), what, page.Clean(message.Text(e.Reason)))
			return max(message.Unavailable, session.ExitStatus(e.Availability))
		})
		return cmp.Or(full, worst.Err())
	}
	return c
}

// showNarinfos returns the narinfos of an item, or the key of the first that has one, and shows
// which servers have none.
func showNarinfos(e explanation, key bool) (text string) {
	for _, r := range e.Servers {
		if r.Narinfo == nil {
			_, why := noNarinfo(r)
			fmt.Fprintf(os.Stderr, "# %s: %s\n", page.Clean(r.URL), page.Clean(why))
			continue
		}
		if key && r.Key == "" {
			continue
		} else if key {
			fmt.Fprintf(os.Stderr, "# signed by %s, from %s\n", page.Clean(r.Signer), page.Clean(r.URL))
			return r.Key + "\n"
		}
		_, signature := worth(r, e.keys)
		text += fmt.Sprintf("# %s: %s\n", page.Clean(r.URL), page.Clean(signature))
		for line := range strings.Lines(r.Narinfo.Text()) {
			text += page.Clean(strings.TrimSuffix(line, "\n")) + "\n"
		}
	}
	return text
}

// worth says what the signature of a narinfo is worth to those who have a list of authorised keys.
func worth(r substitute.ServerReport, keys string) (page.Mark, string) {
	signer := fmt.Sprintf("signed by %s, key %s", r.Signer, fingerprint(r.Key))
	switch {
	case r.Authorised && r.Refused == "":
		who := keys + " authorises"
		if _, err := os.Stat(keys); err != nil {
			who = "is that of this machine"
		}
		return page.Good, signer + ", which " + who
	case r.Authorised:
		return page.Bad, "its signature does not count (" + r.Refused + "), but the settings want none"
	case r.UnknownKey:
		return page.Bad, signer + ", which " + keys + " does not authorise"
	case r.Key == "":
		return page.Note, "not signed"
	}
	return page.Bad, signer + ": " + r.Refused
}
