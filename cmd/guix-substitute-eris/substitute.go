// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/inspect"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
)

// isHelper reports whether the arguments are those of a helper that the daemon starts (Guix,
// nix/libstore/local-store.cc: LocalStore::getLineFromSubstituter and its callers).
func isHelper(args []string) bool {
	return len(args) == 2 && args[0] == "substitute" && (args[1] == "--query" || args[1] == "--substitute")
}

func helper(s *session.Settings, query bool) error {
	// Another program may have left something else there. What this process has opened itself, Go
	// for its own use for example, is closed when a program is started, which this was not.
	mode, err := unix.FcntlInt(protocol.ReplyDescriptor, unix.F_GETFL, 0)
	own, err2 := unix.FcntlInt(protocol.ReplyDescriptor, unix.F_GETFD, 0)
	if errors.Join(err, err2) != nil || own&unix.FD_CLOEXEC != 0 || mode&unix.O_ACCMODE == unix.O_RDONLY {
		return fmt.Errorf("file descriptor %d is not open for replies; to ask by hand, leave out \"substitute\"", protocol.ReplyDescriptor)
	}
	unix.CloseOnExec(protocol.ReplyDescriptor)
	return s.Serve(os.Stdin, protocol.ReplyDescriptor, query, false)
}

// substituteCommand is what the daemon runs, with options that it does not give.
func substituteCommand() *cobra.Command {
	var s session.Settings
	c := &cobra.Command{
		Use:   "--query|--substitute",
		Short: "answer requests of guix-daemon",
		Long:  "Answer requests of guix-daemon, read from standard input, on file descriptor 4.",
	}
	query, fetch := modeFlags(c, "report on the availability of store items", "fetch store items")
	s.Flags(c.Flags())
	c.RunE = func(_ *cobra.Command, args []string) error {
		if c.Flags().NFlag() == 0 && len(args) == 0 {
			return c.Help()
		}
		if len(args) > 0 || *query == *fetch {
			return message.Usage("substitute takes one of --query and --substitute, and reads what is asked from standard input" +
				"\nhint: to ask by hand, leave out \"substitute\": guix-substitute-eris --query /gnu/store/…")
		}
		signal.Reset() // which end it at once
		return helper(&s, *query)
	}
	return c
}

// modeFlags defines the options that say what is done. That for the version is not that of cobra,
// which needs package text/template, with which the program is larger by a fifth.
func modeFlags(c *cobra.Command, queries, substitutes string) (query, substitute *bool) {
	f := c.Flags()
	version := f.BoolP("version", "V", false, "show the version")
	c.PreRunE = func(*cobra.Command, []string) error {
		if !*version {
			return nil
		}
		_, err := fmt.Println("guix-substitute-eris", program.Version())
		return cmp.Or(err, error(message.Status(0))) // that is all
	}
	return f.Bool("query", false, queries), f.Bool("substitute", false, substitutes)
}

// byHandCommand is for people who look for faults.
func byHandCommand() *cobra.Command {
	var s session.Settings
	c := &cobra.Command{}
	query, fetch := modeFlags(c, "say whether store items can be had, or answer requests read from standard input",
		"restore an item to a destination, or answer requests read from standard input")
	raw := c.Flags().Bool("raw", false, "answer about items in the language of the daemon, too")
	s.Flags(c.Flags())
	c.RunE = func(_ *cobra.Command, items []string) error {
		switch err := s.CheckURLs(); {
		case c.Flags().NFlag() == 0:
			return c.Help()
		case *query && *fetch:
			return message.Usage("--query and --substitute are not possible together")
		case !*query && !*fetch:
			return message.Usage("one of --query and --substitute is needed")
		case *fetch && (len(items) != 0 && len(items) != 2 || slices.Contains(items, "")):
			return message.Usage("--substitute takes an item and a destination: --substitute /gnu/store/… /tmp/…")
		case err != nil:
			return err
		case len(items) == 0:
			signal.Reset() // which end it at once between requests
			return s.Serve(os.Stdin, 1, *query, true)
		}
		if _, err := inspect.Load(&s); err != nil {
			return err
		}
		if *query && !*raw {
			return inspect.Answer(c.Context(), &s, items)
		}
		return s.ByHand(c.Context(), *query, items)
	}
	return c
}
