// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// memoryLimit is what the garbage collector keeps the heap below where it can, in bytes.
const memoryLimit = 48 << 20

// garbagePercent is how much garbage there may be for what is in use, as far as the limit allows
// it: with as much as usual, collecting it took a tenth of the time of restoring small files.
const garbagePercent = 400

// lookAhead is how many narinfos are fetched ahead for one client of the daemon.
const lookAhead = 10000

const substituteUsage = `Usage: guix-substitute-eris substitute --query|--substitute [OPTION]...
Answer requests of guix-daemon, read from standard input, on file descriptor 4.
`

// substituteCommand is what the daemon runs.
func substituteCommand(args []string) int {
	var s settings
	flags := flag.NewFlagSet("substitute", flag.ContinueOnError)
	query := flags.Bool("query", false, "report on the availability of store items")
	fetch := flags.Bool("substitute", false, "fetch store items")
	short := flags.Bool("V", false, "show the version, like --version")
	long := flags.Bool("version", false, "show the version")
	s.flags(flags)
	if len(args) == 0 {
		printUsage(os.Stdout, flags, substituteUsage)
		return 0
	}
	if status, ok := parse(flags, args, substituteUsage); !ok {
		return status
	}
	if *short || *long {
		return run([]string{"--version"})
	}
	if flags.NArg() > 0 || *query == *fetch {
		return usageError("%q: unrecognized options", strings.Join(args, " "))
	}
	// Another program may have left something else there.
	mode, err := unix.FcntlInt(protocol.ReplyDescriptor, unix.F_GETFL, 0)
	if err != nil || mode&unix.O_ACCMODE == unix.O_RDONLY {
		return fail("file descriptor %d is not open for replies; to ask by hand, leave out \"substitute\"", protocol.ReplyDescriptor)
	}
	unix.CloseOnExec(protocol.ReplyDescriptor)
	s.load()
	return s.serve(os.Stdin, protocol.ReplyDescriptor, *query)
}

const byHandUsage = `Usage: guix-substitute-eris --query [OPTION]... [ITEM]...
       guix-substitute-eris --substitute [OPTION]... [ITEM DESTINATION]
Do by hand what guix-daemon has "guix substitute" do. Without arguments, requests
are read from standard input, and replies go to standard output in the language
of the daemon.
`

// byHandCommand is for people who look for faults.
func byHandCommand(args []string) int {
	var s settings
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	query := flags.Bool("query", false, "say whether store items can be had")
	fetch := flags.Bool("substitute", false, "restore a store item")
	raw := flags.Bool("raw", false, "answer about items in the language of the daemon, too")
	s.flags(flags)
	if status, ok := parse(flags, args, byHandUsage); !ok {
		return status
	}
	items := flags.Args()
	switch _, known := policies[s.policy]; {
	case *query == *fetch:
		return usageError("one of --query and --substitute is needed")
	case *fetch && len(items) != 0 && len(items) != 2:
		return usageError("--substitute takes an item and a destination: --substitute /gnu/store/… /tmp/…")
	case !known:
		return usageError("%s", unknown("policy", s.policy, slices.Sorted(maps.Keys(policies))))
	}
	s.byHand = true
	s.load()
	if len(items) == 0 {
		return s.serve(os.Stdin, 1, *query)
	}
	ctx, stop := untilSignal()
	defer stop()
	if *query && !*raw {
		return s.answerInWords(ctx, items)
	}
	s.showNotes()
	sub := s.session(*query)
	defer sub.close()
	if *fetch {
		s.confine(items[1])
	}
	s.showNotes()
	sub.SetKeys(s.keys())
	var reply []byte
	result := 0
	if *query {
		records := sub.Info(ctx, items)
		reply = protocol.AppendInfo(nil, records)
		if !s.sayMissing(items, records) {
			result = statusUnavailable
		}
	} else {
		unix.Umask(0o022)
		outcome := s.restore(ctx, sub, items[0], items[1])
		reply = appendOutcome(nil, outcome)
		switch outcome.Status {
		case substitute.NotFound:
			result = statusUnavailable
		case substitute.HashMismatch:
			result = statusFailed
		}
	}
	if _, err := os.Stdout.Write(reply); err != nil {
		return fail("%w", err)
	}
	if ctx.Err() != nil {
		return fail("interrupted")
	}
	return result
}

// sayMissing names the items that cannot be had, and reports whether there are none.
func (s *settings) sayMissing(items []string, records []protocol.Info) bool {
	complete := true
	for _, item := range items {
		if !slices.ContainsFunc(records, func(r protocol.Info) bool { return r.Path == item }) {
			s.log.Errorf("no server offers '%s' so that it can be used", item)
			complete = false
		}
	}
	return complete
}

// errNotRestored is for what has been told already.
var errNotRestored = errors.New("not restored")

// restore restores an item. The destination is the daemon's, who wants what is there to be
// replaced; a person's files are not touched.
func (s *settings) restore(ctx context.Context, sub *session, item, destination string) substitute.Outcome {
	defer sub.after()
	if !s.byHand {
		return sub.staging.Substitute(ctx, item, destination)
	}
	var outcome substitute.Outcome
	destination, err := checkNew(destination)
	if err == nil {
		err = makeTree(destination, func(temporary string) error {
			if outcome = sub.Substitute(ctx, item, temporary); outcome.Status != substitute.Success {
				return errNotRestored
			}
			return nil
		})
	}
	if err == nil || errors.Is(err, errNotRestored) {
		return outcome
	}
	s.log.Errorf("%v", err)
	return substitute.Outcome{}
}

// serve answers requests until there are no more. It does not end earlier, whatever happens: the
// daemon would take that for a failure of everything.
func (s *settings) serve(stdin io.Reader, replies int, query bool) int {
	if !query {
		unix.Umask(0o022)
		debug.SetMemoryLimit(memoryLimit)
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(garbagePercent)
		}
	}
	sub := s.session(query)
	defer sub.close()
	cleaned := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(cleaned)
		s.clean()
		if query && sub.Cache != nil {
			sub.Cache.Clean(time.Now(), stop)
		}
	}()
	defer func() {
		close(stop)
		<-cleaned
	}()
	if query {
		sub.LookAhead = lookAhead
		sub.noted = s.daemonSession()
	}
	requests := protocol.NewRequests(stdin)
	for first := true; ; first = false {
		request, err := requests.Next()
		var tooLong *protocol.TooLongError
		switch {
		case err == io.EOF:
			return 0
		case errors.As(err, &tooLong):
			s.log.Errorf("%v", err)
		case err != nil:
			return fail("%w", err)
		}
		if first && !s.byHand {
			s.confine(destinationOf(request))
		}
		s.showNotes()
		if first || !query {
			s.renewKeys(sub, query, first)
		}
		ctx, stop := s.requestContext()
		reply := s.answer(ctx, sub, request, query)
		interrupted := ctx.Err() != nil
		stop()
		if err := writeAll(replies, reply); err != nil {
			return fail("cannot reply: %v", err)
		}
		if interrupted {
			return fail("interrupted")
		}
	}
}

// requestContext returns the context of a request. A person ends one by a signal; the daemon kills.
func (s *settings) requestContext() (context.Context, context.CancelFunc) {
	if s.byHand {
		return untilSignal()
	}
	return context.WithCancel(context.Background())
}

// renewKeys reads the list of authorised keys. If it has changed, what is staged does not count.
func (s *settings) renewKeys(sub *session, query, first bool) {
	keys := s.keys()
	if !first && sameKeys(keys, sub.Keys) {
		return
	}
	if sub.staging != nil {
		sub.staging.Close()
	}
	sub.SetKeys(keys)
	if !query {
		sub.staging = s.ahead(sub)
	}
}

func sameKeys(a, b *acl.ACL) bool {
	if a == nil || b == nil {
		return a == b
	}
	return slices.EqualFunc(a.Keys(), b.Keys(), func(a, b *acl.PublicKey) bool { return a.Equal(b) })
}

// answer returns the reply to a request; there is one whatever happens.
func (s *settings) answer(ctx context.Context, sub *session, request protocol.Request, query bool) (reply []byte) {
	defer func() {
		if fault := recover(); fault != nil {
			s.log.Errorf("internal error: %v: %s", fault, debug.Stack())
			reply = noReply(query)
			if destination := destinationOf(request); !query && !s.byHand && destination != "" {
				// Nothing half-made stays, as after any other failure.
				if err := restore.Remove(destination); err != nil {
					s.log.Errorf("%v", err)
				}
			}
		}
	}()
	arguments := request.Arguments
	switch {
	case query && request.Command == "have":
		return protocol.AppendHave(nil, sub.Have(ctx, arguments))
	case query && request.Command == "info":
		records := sub.Info(ctx, arguments)
		sub.note(arguments, records)
		return protocol.AppendInfo(nil, records)
	case !query && destinationOf(request) != "":
		return appendOutcome(nil, s.restore(ctx, sub, arguments[0], arguments[1]))
	}
	s.log.Errorf("request %.200q with %d arguments is not understood", request.Command, len(arguments))
	return noReply(query)
}

// destinationOf is where a request wants something to be, if anywhere.
func destinationOf(r protocol.Request) string {
	if r.Command == "substitute" && len(r.Arguments) == 2 {
		return r.Arguments[1]
	}
	return ""
}

// noReply is the reply that says nothing is available.
func noReply(query bool) []byte {
	if query {
		return protocol.AppendHave(nil, nil)
	}
	return protocol.AppendNotFound(nil)
}

func appendOutcome(dst []byte, o substitute.Outcome) []byte {
	switch o.Status {
	case substitute.Success:
		return protocol.AppendSuccess(dst, o.NarHash, o.NarSize)
	case substitute.HashMismatch:
		return protocol.AppendHashMismatch(dst, o.Expected, o.Actual)
	}
	return protocol.AppendNotFound(dst)
}

// writeAll writes a reply, with a single write unless the pipe takes less.
func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		switch err {
		case nil:
			b = b[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1)
		default:
			return err
		}
	}
	return nil
}
