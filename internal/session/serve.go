// SPDX-License-Identifier: GPL-3.0-or-later

package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/ahead"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/confine"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// memoryLimit is what the garbage collector keeps the heap below where it can, in bytes.
const memoryLimit = 44 << 20

// garbagePercent is how much garbage there may be for what is in use, as far as the limit allows
// it: with as much as usual, collecting it took a tenth of the time of restoring small files.
const garbagePercent = 400

// lookAhead is how many narinfos are fetched ahead for one client of the daemon.
const lookAhead = 10000

// ByHand does once what a helper does, for a person: it answers about the items to standard output,
// or, unless it is a query, restores the first item to a destination that there must not be. The
// error may be a [message.Status].
func (s *Settings) ByHand(ctx context.Context, query bool, items []string) error {
	s.byHand = true
	if !query {
		s.seeding = s.seeds()
		defer s.seeding.Close()
	}
	sub := s.Session(query)
	defer sub.Close()
	if !query {
		item, err := s.FindItem(ctx, sub, items[0])
		destination, err2 := filepath.Abs(items[1]) // "out/" is "out"
		if err = cmp.Or(err, err2); err != nil {
			return err
		}
		s.confine(destination)
		items = []string{item, destination}
	}
	sub.SetKeys(s.Keys())
	var reply string
	var result message.Status
	if query {
		items = Names(items)
		records := sub.Info(ctx, items)
		reply = protocol.ReplyInfo(records)
		if !s.sayMissing(items, records) {
			result = message.Unavailable
		}
	} else {
		unix.Umask(0o022)
		outcome, err := s.restore(ctx, sub, items[0], items[1])
		if err != nil {
			return err
		}
		reply = replyOf(outcome)
		switch outcome.Status {
		case substitute.NotFound:
			result = sub.WhyNot(ctx, items[0])
			s.log.Notef("\"guix-substitute-eris explain ITEM\" says why")
		case substitute.HashMismatch, substitute.Full:
			result = message.Failed
		}
	}
	if _, err := os.Stdout.WriteString(reply); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return errInterrupted
	}
	return result.Err()
}

var errInterrupted = errors.New("interrupted")

// sayMissing names the items that cannot be had, and reports whether there are none.
func (s *Settings) sayMissing(items []string, records []protocol.Info) bool {
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
// replaced, if it is not the store; a person's files are not touched.
func (s *Settings) restore(ctx context.Context, sub *Session, item, destination string) (outcome substitute.Outcome, err error) {
	defer sub.after()
	if destination, err = filepath.Abs(destination); err != nil {
		return outcome, err
	}
	if err := s.checkDestination(item, destination); err != nil {
		return outcome, err
	}
	if !s.byHand {
		return sub.staging.Substitute(ctx, item, destination), nil
	}
	if err = restore.CheckNew(destination); err == nil {
		err = restore.Whole(destination, func(temporary string) error {
			if outcome = sub.Substitute(ctx, item, temporary); outcome.Status != substitute.Success {
				return errNotRestored
			}
			return nil
		})
	}
	if errors.Is(err, errNotRestored) {
		err = nil
	}
	return outcome, err
}

// checkDestination refuses what would take the place of other things than store items, devices for
// example. What the daemon wants is the item, or the name that it has while it is repaired (Guix,
// nix/libstore/build.cc: SubstitutionGoal::tryToRun).
func (s *Settings) checkDestination(item, destination string) error {
	if (destination == item || destination == item+".tmp") && narinfo.CheckStorePath(s.Store, item) == nil {
		return nil
	}
	real := destination
	if parent, err := filepath.EvalSymlinks(filepath.Dir(destination)); err == nil {
		real = filepath.Join(parent, filepath.Base(destination))
	}
	info, err := os.Lstat(destination)
	if err == nil && info.Mode().Type()&^(fs.ModeDir|fs.ModeSymlink) != 0 {
		return fmt.Errorf("%.300q cannot be a destination: it is no file, directory or symbolic link", destination)
	}
	for _, used := range []string{s.Store, settings.StateDirectory(), settings.Directory(), s.kept} {
		target, _ := filepath.EvalSymlinks(used) // which need not be there
		if used == "" {
			continue
		}
		above := within(used, destination) || target != "" && within(target, real)
		inside := within(destination, used) || target != "" && within(real, target)
		if above || inside && err == nil {
			return fmt.Errorf("%.300q cannot be a destination: it would take the place of what is in %s", destination, used)
		}
	}
	return nil
}

// within reports whether a file name is another one, or in it.
func within(name, directory string) bool {
	return strings.HasPrefix(name+"/", strings.TrimSuffix(directory, "/")+"/")
}

// Serve loads the settings, and answers requests until there are no more, to the daemon or, by
// hand, to a person. It does not end earlier, whatever happens: the daemon would take that for a
// failure of everything.
func (s *Settings) Serve(stdin io.Reader, replies int, query, byHand bool) error {
	s.byHand = byHand
	s.begin()
	requests := s.log.Requests(stdin)
	s.read()
	if !query {
		unix.Umask(0o022)
		debug.SetMemoryLimit(memoryLimit)
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(garbagePercent)
		}
	}
	if !query && !byHand {
		s.guard()
	}
	if !query {
		s.seeding = s.seeds()
		defer s.seeding.Close()
	}
	s.near = s.neighbours()
	defer s.near.close()
	sub := s.Session(query)
	defer func() { sub.Close() }()
	renew := func() {
		sub.Close()
		sub = s.Session(query)
		s.renewKeys(sub, query, true)
	}
	var cleaning sync.WaitGroup
	cleaning.Go(s.clean)
	defer cleaning.Wait()
	if query {
		sub.LookAhead = lookAhead
		sub.noted = s.daemonSession()
	}
	read, stopReading := whileRead(replies)
	defer stopReading()
	for first := true; ; first = false {
		request, err := requests.Next()
		switch {
		case err == io.EOF:
			return nil
		case errors.As(err, new(*protocol.TooLongError)):
			s.log.Errorf("%v", err)
		case err != nil:
			return err
		}
		if first && !s.byHand {
			s.confine(destinationOf(request))
		}
		switch {
		case !first && !query && s.near.changed():
			renew()
		case first || !query:
			s.renewKeys(sub, query, first)
		}
		ctx, stop := context.WithCancel(read)
		if s.byHand { // the daemon kills, or is gone
			stop()
			ctx, stop = program.UntilSignal()
		}
		reply := s.answer(ctx, sub, request, query)
		if !query && reply == protocol.ReplyNotFound && s.near.awaited() {
			renew()
			s.failed = ""
			reply = s.answer(ctx, sub, request, query)
		}
		if s.failed != "" {
			s.log.Errorf("%s", s.failed)
			s.failed = ""
		}
		interrupted := ctx.Err() != nil
		stop()
		if err := requests.Reply(replies, reply); err != nil {
			return fmt.Errorf("cannot reply: %v", err)
		}
		if interrupted {
			return errInterrupted
		}
	}
}

// whileRead returns a context that ends when nobody can read the replies any more: when the daemon
// was killed, another one may want the same destination, and nothing should go on to write there.
func whileRead(replies int) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var pipe [2]int
	if unix.Pipe2(pipe[:], unix.O_CLOEXEC) != nil {
		return ctx, cancel
	}
	var watch sync.WaitGroup
	watch.Go(func() {
		defer unix.Close(pipe[0])
		defer cancel()
		// Without events that are wanted it returns when one of the other ends is closed.
		ends := []unix.PollFd{{Fd: int32(replies)}, {Fd: int32(pipe[0])}}
		for _, err := unix.Poll(ends, -1); err == unix.EINTR; _, err = unix.Poll(ends, -1) {
		}
	})
	return ctx, func() {
		unix.Close(pipe[1])
		watch.Wait()
	}
}

// renewKeys reads the list of authorised keys. If it has changed, what is staged does not count.
func (s *Settings) renewKeys(sub *Session, query, first bool) {
	keys := s.Keys()
	if !first && slices.EqualFunc(keys.Keys(), sub.Keys.Keys(), (*acl.PublicKey).Equal) {
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

// answer returns the reply to a request; there is one whatever happens.
func (s *Settings) answer(ctx context.Context, sub *Session, request protocol.Request, query bool) (reply string) {
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
		return protocol.ReplyHave(sub.Have(ctx, arguments))
	case query && request.Command == "info":
		records := sub.Info(ctx, arguments)
		sub.note(arguments, records)
		return protocol.ReplyInfo(records)
	case !query && destinationOf(request) != "":
		outcome, err := s.restore(ctx, sub, arguments[0], arguments[1])
		if err != nil {
			s.log.Errorf("%v", err)
			outcome = substitute.Outcome{}
		}
		return replyOf(outcome)
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

func noReply(query bool) string {
	if query {
		return protocol.ReplyHave(nil)
	}
	return protocol.ReplyNotFound
}

func replyOf(o substitute.Outcome) string {
	switch o.Status {
	case substitute.Success:
		return protocol.ReplySuccess(o.NarHash, o.NarSize)
	case substitute.HashMismatch:
		return protocol.ReplyHashMismatch(o.Expected, o.Actual)
	}
	return protocol.ReplyNotFound
}

// CleanOption is the option of a helper that cleans up after another one; see [CleanAfter].
const CleanOption = "--clean"

// guard starts what removes what is staged, and writes down what was counted, when this process has
// ended.
func (s *Settings) guard() {
	if session := s.daemonSession(); session != nil {
		session.Guard(s.Store, "substitute", CleanOption, s.inCache("sources"))
	}
}

// CleanAfter is what a helper runs with [CleanOption], the file of what is known of sources, the
// store and the name of a session: see [ahead.CleanAfter].
func CleanAfter(sources, store, session string) {
	state := sourcestate.Open(sources)
	state.CountAhead(ahead.CleanAfter(os.Stdin, store, session))
	state.Save()
}

func (s *Settings) clean() {
	if directory := s.inCache("sessions"); directory != "" {
		ahead.CleanSessions(directory)
	}
	ahead.CleanStages(s.Store)
}

// systemFiles are what the libraries of Go read: certificates, names of hosts and servers of names,
// time zones, and what the kernel says of this process and of control groups. It is all of /etc,
// because what is there is replaced by new files while helpers run, and Landlock, whose rules are
// about files and not about their names, could allow only those that are there at the start. Below
// /run are keys of services, and sessions of users.
var systemFiles = []string{
	"/etc", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/usr/share", "/usr/local/share",
	"/var/lib/ca-certificates", "/proc", "/sys", "/dev/null", "/dev/urandom",
}

// Confines reports whether helpers confine themselves.
func (s *Settings) Confines() bool { return s.file.Confine }

// confine confines this process before it reads what servers send. The destination is that of the
// first request, which is the daemon's word; all others of the daemon are in the store.
func (s *Settings) confine(destination string) {
	if !s.Confines() {
		return
	}
	if err := confine.Process(s.usedFiles(destination)); err != nil && (s.verbose || s.file.Verbose) {
		s.log.Warnf("%v", err)
	}
}

func (s *Settings) usedFiles(destination string) confine.Paths {
	paths := confine.Paths{
		Write: []string{s.Store},
		Read:  append(slices.Clone(systemFiles), settings.Directory(), settings.StateDirectory(), filepath.Dir(settings.DatabaseFile()), filepath.Dir(s.KeysFile())),
	}
	if destination != "" {
		paths.Write = append(paths.Write, filepath.Dir(destination))
	}
	if s.kept != "" {
		paths.Write = append(paths.Write, s.kept)
	}
	// Where the names of these are links to is not known beforehand. What is in /etc may be read.
	for _, file := range []string{"/etc/resolv.conf", "/etc/hosts", os.Getenv("SSL_CERT_FILE"), os.Getenv("SSL_CERT_DIR")} {
		if file == "" {
			continue // which would be the current directory
		}
		if file, err := filepath.EvalSymlinks(file); err == nil && !strings.HasPrefix(file, "/etc/") {
			paths.Read = append(paths.Read, file, filepath.Dir(file))
		}
	}
	for _, url := range s.ServerURLs() {
		directories := mirror.LocalDirectories(url)
		if directories != nil && s.publicFiles() == nil {
			// What the administrator has named may have links to anywhere.
			directories = []string{"/"}
		}
		paths.Read = append(paths.Read, directories...)
	}
	for _, text := range settings.NamedStores(s.stores, s.file) {
		u, err := storeurl.Parse(text)
		switch {
		case err != nil:
		case u.Scheme == "file":
			paths.Write = append(paths.Write, u.Path)
		case u.Scheme == "dump":
			paths.Write = append(paths.Write, filepath.Dir(u.Path))
		}
	}
	return paths
}
