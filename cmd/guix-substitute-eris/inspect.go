// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// answerInWords says of items whether they can be had, for --query by hand.
func (s *settings) answerInWords(ctx context.Context, items []string) int {
	sub := s.silentSession(false) // blocks may be the only way
	defer sub.close()
	p := newPage()
	worst := s.forItems(ctx, sub, items, func(e explanation) int {
		p.line(0, "%s", e.Path)
		if e.Availability != substitute.Available {
			p.say(2, bad, "%s: %s", e.Availability, plainText(e.Reason))
			return exitStatus[e.Availability]
		}
		for _, r := range e.Servers {
			if r.Vouches {
				p.say(2, good, "%s from %s, signed by %s", e.Availability, r.URL, r.Signer)
				break
			}
		}
		p.say(2, note, "%s unpacked, %s, %s", shownSize(int64(e.NarSize)), count(e.References, "reference"), e.NarHash)
		return 0
	})
	if worst > 0 && p.Len() > 0 {
		p.line(0, "\"guix-substitute-eris explain ITEM\" says more.")
	}
	if _, err := io.WriteString(os.Stdout, p.String()); err != nil {
		return fail("%w", err)
	}
	return worst
}

const narinfoUsage = `Usage: guix-substitute-eris narinfo [OPTION]... ITEM...
Show the narinfos of store items that the substitute servers have, each below a
line that says which server it is from, and what its signature is worth.
`

// narinfoCommand shows what servers say.
func narinfoCommand(args []string) int {
	var s settings
	flags := flag.NewFlagSet("narinfo", flag.ContinueOnError)
	key := flags.Bool("key", false, "show the public key by which the first narinfo that has one is signed, for \"guix archive --authorize\"")
	s.flags(flags)
	if status, ok := parse(flags, args, narinfoUsage); !ok {
		return status
	}
	items := flags.Args()
	if len(items) == 0 {
		return usageError("narinfo takes store items: guix-substitute-eris narinfo /gnu/store/…")
	}
	s.load()
	ctx, stop := untilSignal()
	defer stop()
	sub := s.silentSession(true)
	defer sub.close()
	return s.forItems(ctx, sub, items, func(e explanation) int {
		if showNarinfos(&e.Explanation, *key) {
			return 0
		}
		fmt.Fprintf(os.Stderr, "%s: %s: %s\n", e.Path, substitute.NotAvailable, plainText(e.Reason))
		return max(statusUnavailable, exitStatus[e.Availability])
	})
}

// showNarinfos shows the narinfos of an item, or the key of the first that has one, and reports
// whether there was anything to show.
func showNarinfos(e *substitute.Explanation, key bool) (shown bool) {
	p := &page{columns: 1 << 20, unicode: unicode()}
	for _, r := range e.Servers {
		switch {
		case r.Narinfo == nil && r.Failure != "":
			fmt.Fprintf(os.Stderr, "# %s: %s\n", p.clean(r.URL), p.clean(plainText(strings.TrimPrefix(r.Failure, r.URL+": "))))
			continue
		case r.Narinfo == nil:
			fmt.Fprintf(os.Stderr, "# %s: no narinfo (status %d)\n", p.clean(r.URL), r.Status)
			continue
		case key && r.Key == "":
			continue
		}
		if key {
			fmt.Fprintf(os.Stderr, "# signed by %s, from %s\n", p.clean(r.Signer), p.clean(r.URL))
			fmt.Println(r.Key)
			return true
		}
		fmt.Printf("# %s: %s\n", p.clean(r.URL), p.clean(worth(r)))
		for line := range strings.Lines(r.Narinfo.Text()) {
			fmt.Println(p.clean(strings.TrimSuffix(line, "\n")))
		}
		shown = true
	}
	return shown
}

// worth says in some words what the signature of a narinfo is worth.
func worth(r substitute.ServerReport) string {
	signer := fmt.Sprintf("signed by %s, key %s", r.Signer, fingerprint(r.Key))
	switch {
	case r.Key == "":
		return "not signed"
	case r.UnknownKey:
		return signer + ", which is not authorised"
	case r.Refused != "":
		return signer + ": " + r.Refused
	}
	return signer + ", which is authorised"
}

const keygenUsage = `Usage: guix-substitute-eris keygen [OPTION]...
Make a key pair to sign narinfos with, as "guix archive --generate-key" does. No
file is overwritten.
`

// keygenCommand makes a key pair.
func keygenCommand(args []string) int {
	flags := flag.NewFlagSet("keygen", flag.ContinueOnError)
	public := flags.String("public-key", filepath.Join(configurationDirectory(), "signing-key.pub"), "write the public key to `FILE`")
	secret := flags.String("private-key", filepath.Join(configurationDirectory(), "signing-key.sec"), "write the private key to `FILE`, which only its owner can read")
	if status, ok := parse(flags, args, keygenUsage); !ok {
		return status
	}
	rest := flags.Args()
	if len(rest) > 0 {
		return usageError("keygen takes no arguments, and %q was given", rest[0])
	}
	if err := keygen(*public, *secret); err != nil {
		return fail("the key pair is not made: %w", err)
	}
	fmt.Printf("public key:  %s\nprivate key: %s\n", *public, *secret)
	fmt.Printf("Whoever is to trust it: sudo guix archive --authorize < %s\n", filepath.Base(*public))
	return 0
}

func keygen(public, secret string) error {
	for _, name := range []string{public, secret} {
		if _, err := os.Lstat(name); err == nil {
			return fmt.Errorf("%s exists, and others may trust it\nhint: move it away, or name another file by --public-key and --private-key", name)
		}
	}
	for _, name := range []string{public, secret} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
	}
	key := acl.GenerateSigningKey()
	write := func(name, text string, mode os.FileMode) error {
		return files.Replace(name, mode, files.Options{Sync: true, New: true}, func(w io.Writer) error {
			_, err := io.WriteString(w, text)
			return err
		})
	}
	// The private one first: a public key without it is of no use.
	if err := write(secret, key.SecretText(), 0o400); err != nil {
		return err
	}
	return write(public, key.PublicKey().Text(), 0o444)
}
