// SPDX-License-Identifier: GPL-3.0-or-later

package setup

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/dial"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
)

// changeFlags are the options of the commands that change the system.
type changeFlags struct {
	yes, dryRun bool
	root        string

	told page.Teller
}

func (c *changeFlags) flags(f *pflag.FlagSet) {
	f.BoolVar(&c.yes, "yes", false, "do not ask")
	f.BoolVar(&c.dryRun, "dry-run", false, "say what would be done, and do nothing")
	f.StringVar(&c.root, "root", os.Getenv("GUIX_SUBSTITUTE_ERIS_SYSTEM_ROOT"), "change the system in `DIRECTORY`, which does not run: an image, for example")
}

// Setup is the command that puts the program in place, or takes that back.
func Setup() *cobra.Command {
	var change changeFlags
	var o Options
	c := &cobra.Command{
		Short: "have guix-daemon use this program; --undo",
		Long: `Put this program in place: have guix-daemon start it in place of
"guix substitute", and set up a block store as a service. It says what it would
do, asks, and keeps a record, by which --undo restores what was there before.`,
		Args: message.NoArguments,
	}
	f := c.Flags()
	undo := f.Bool("undo", false, "restore what was there before \"setup\" and \"use\"")
	f.BoolVar(&o.Share, "share", false, "let others have the items of this machine, and their blocks, over the network")
	noStore := f.Bool("no-store", false, "set up no block store")
	f.StringVar(&o.Way, "way", "", "have guix-daemon start the program in this `WAY`: extension (of Guix), or program (in place of guix); else as it suits the daemon")
	change.flags(f)
	c.RunE = func(*cobra.Command, []string) error {
		if !slices.Contains([]string{"", "extension", "program"}, o.Way) {
			return message.Usage("--way is extension or program, and not %q", o.Way)
		}
		switch {
		case *undo && (o.Share || *noStore || o.Way != ""):
			return message.Usage("--undo takes back all of it; leave out --share, --no-store and --way")
		case o.Share && *noStore:
			return message.Usage("--share needs the block store; leave out --no-store")
		}
		o.Store = !*noStore
		program, err := leaveStore()
		if err != nil {
			return err
		}
		o.Program = program
		s, err := Open(change.root)
		switch {
		case err != nil:
			return err
		case *undo:
			return cmp.Or(change.undo(c.Context(), s), change.told.Err())
		}
		return cmp.Or(change.install(c.Context(), s, o), change.told.Err())
	}
	return c
}

// leaveStore returns the file name of this program. One in the store goes on as a copy in memory:
// while a program runs from there, gnu-store.mount cannot be unmounted, so that guix-daemon, which
// is restarted here, could not write to the store (Guix, etc/guix-daemon.service.in).
func leaveStore() (name string, err error) {
	name, err = os.Executable()
	name, copied := strings.CutPrefix(name, "/memfd:")
	if err != nil || copied || !strings.HasPrefix(name, settings.StoreDirectory()+"/") {
		return name, err
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if _, err := f.Write(text); err != nil {
		return "", err
	}
	return "", unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), os.Args, os.Environ())
}

func (c *changeFlags) install(ctx context.Context, s *System, o Options) (err error) {
	if o.RealGuix, err = program.RealGuix(""); err != nil || c.root != "" {
		o.RealGuix = "" // which is not known of another system
	}
	steps, notes, err := s.Install(o)
	if errors.Is(err, ErrGuixSystem) {
		return fmt.Errorf("%w\nhint: add these services to it, with the option -L of \"guix system\" for the directory etc/guix of the sources:\n%s", err, declaration)
	} else if err != nil {
		return err
	}
	if err := c.change(ctx, s, steps, "\"guix-substitute-eris setup --undo\" takes it back."); err != nil {
		return err
	}
	for _, n := range notes {
		c.say("note: %s", n)
	}
	return nil
}

// declaration is what users of Guix System put into their declaration.
const declaration = `  (use-modules (guix-substitute-eris services))
  (services
   (cons* (service substitute-eris-service-type)
          (service eris-block-store-service-type)
          (modify-services %base-services
            (guix-service-type config => (with-substitute-eris config)))))`

func (c *changeFlags) undo(ctx context.Context, s *System) error {
	if err := c.permitted(); err != nil {
		return err
	}
	would := ""
	nothing, err := s.Undo(true, func(format string, a ...any) { would += fmt.Sprintf(format+"\n", a...) })
	if err == nil && nothing {
		c.say("There is nothing to take back.")
	} else if err == nil {
		err = c.agreed(ctx, would, "Restore what was there before?")
	}
	if err != nil || c.dryRun {
		return err
	}
	// Also where nothing is: a process that was killed at the beginning has left an empty record.
	undone, err := s.Undo(false, c.say)
	if err == nil && !undone {
		err = errors.New("some things are left\nhint: mend them by hand; what was there before, if anything, is beside each file, as FILE.before-guix-substitute-eris-1; --undo tries again")
	}
	return err
}

// errNothingDone is the outcome of a question that was answered by no.
var errNothingDone = errors.New("nothing was done")

func (c *changeFlags) say(format string, a ...any) {
	c.told.Say("%s", page.Wrap(1, fmt.Sprintf(format+"\n", a...)))
}

func (c *changeFlags) permitted() error {
	if c.root == "" && os.Geteuid() != 0 && !c.dryRun {
		return errors.New("only root can change the system\nhint: run it by sudo, or with --dry-run to see what it would do")
	}
	return nil
}

// agreed says what would be done, and asks a question, unless that is not wanted. The error is
// errNothingDone if the answer is no, or there is none, also because a signal comes first.
func (c *changeFlags) agreed(ctx context.Context, would, question string) error {
	if c.yes && !c.dryRun {
		return nil
	}
	if _, err := fmt.Print(page.Wrap(1, would)); err != nil || c.dryRun {
		return err // who cannot be told has not agreed
	}
	c.told.Say("%s [y/N] ", question)
	defer context.AfterFunc(ctx, func() { // nothing else breaks off reading from a terminal
		fmt.Println()
		os.Exit(message.Report(errNothingDone))
	})()
	answer, err := bufio.NewReader(os.Stdin).ReadString('\n')
	switch {
	case slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(answer))):
		return nil
	case answer == "" && err != nil:
		c.say("")
		return fmt.Errorf("%w, as nobody answered\nhint: --yes does it without a question", errNothingDone)
	}
	return errNothingDone
}

// change does steps, if the user agrees.
func (c *changeFlags) change(ctx context.Context, s *System, steps []Step, done string) error {
	if err := c.permitted(); err != nil {
		return err
	}
	if len(steps) == 0 {
		c.say("All of it is in place already.")
		return nil
	}
	would := ""
	for _, step := range steps {
		if step.String() != "" {
			would += fmt.Sprintf("would %v\n", step)
		}
	}
	if err := c.agreed(ctx, would, "Do it?"); err != nil || c.dryRun {
		return err
	}
	defer unix.Umask(unix.Umask(0o022)) // what is made must be readable by the daemon
	if err := s.Do(steps, c.say); err != nil {
		return fmt.Errorf("%w\nhint: when that is mended, the same command does the rest; \"guix-substitute-eris setup --undo\" takes back what was done before", err)
	}
	c.say("%s", done)
	return nil
}

// UseServer is the command that adds a substitute server.
func UseServer() *cobra.Command {
	var change changeFlags
	c := &cobra.Command{
		Use:   "URL",
		Short: "get substitutes from a server, after a look at its key",
		Long: `Have substitutes come from the server at URL before all others: authorise its
key, and add the server and its block stores to the configuration file. The key
is shown before. Whoever has its private part can put anything on this machine:
compare it with what the administrator of the server says.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return message.Usage("use takes one URL: guix-substitute-eris use http://lan.example:8080")
			}
			return nil
		},
	}
	key := c.Flags().String("key", "", "authorise the key in `FILE`, and not the one that the server shows; \"none\" authorises none")
	change.flags(c.Flags())
	c.RunE = func(_ *cobra.Command, args []string) error {
		return cmp.Or(change.use(c.Context(), strings.TrimRight(args[0], "/"), *key), change.told.Err())
	}
	return c
}

func (c *changeFlags) use(ctx context.Context, server, keyFile string) error {
	if path := strings.TrimPrefix(server, "file:"); strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "//") {
		return message.Usage("%q is not the whole URL of a server\nhint: write file://%s for a directory", server, path)
	} else if !strings.Contains(server, "://") && !strings.HasSuffix(server, ":") { // of http://
		return message.Usage("%q is not the whole URL of a server\nhint: write http://%s, or file:///… for a directory", server, server)
	} else if err := mirror.CheckURL(server); err != nil {
		return message.Usage("%w\nhint: a server has a URL like http://lan.example:8080, and a stick file:///media/stick", err)
	}
	if strings.HasPrefix(server, "file:") {
		server = strings.ReplaceAll(server, " ", "%20") // spaces separate URLs
	}
	s, err := Open(c.root)
	if err != nil {
		return err
	}
	offer, err := readOffer(ctx, server, keyFile)
	if err != nil {
		return err
	}
	p := page.New()
	p.Say(0, page.Good, "%s is a substitute server", mirror.WithoutUser(server))
	if mirror.WithoutUser(server) != server {
		p.Say(0, page.Note, "its password will be in %s: whoever may read that file has it", configurationFile)
	}
	for _, store := range offer.stores {
		p.Say(0, page.Note, "blocks: %s", store)
	}
	if offer.key != nil {
		known := "which is not authorised yet"
		if s.Authorised(offer.key) {
			known = "which is authorised"
		}
		p.Say(0, page.Note, "key: %s, %s", fullFingerprint(offer.key), known)
	}
	if err := p.Print(); err != nil {
		return err
	}
	steps, err := s.Use(server, offer.stores, offer.key)
	if errors.Is(err, ErrGuixSystem) {
		return fmt.Errorf("%w\nhint: add %q to substitute-urls and the key of %s/signing-key.pub to authorized-keys of the guix-configuration", err, server, server)
	} else if err != nil {
		return err
	}
	done := "Substitutes come from there, too."
	if mirror.IsLocal(server) {
		done += "\nnote: guix-daemon may see only what was plugged in when it was started: \"sudo systemctl restart guix-daemon\""
	}
	if !s.exists(dropIn) {
		done = "note: if guix-daemon does not use this program yet, \"sudo guix-substitute-eris setup\" has it do so; see \"doctor\""
	}
	return c.change(ctx, s, steps, done+"\n\"guix-substitute-eris setup --undo\" takes it back.")
}

// fullFingerprint is what identifies a key, as its file has it.
func fullFingerprint(key *acl.PublicKey) string {
	_, after, _ := strings.Cut(key.Text(), "#")
	number, _, _ := strings.Cut(after, "#")
	return "#" + number + "#"
}

// An offer is what a substitute server says of itself.
type offer struct {
	key    *acl.PublicKey // nil is none
	stores []string
}

// readOffer finds out what a server offers. Over HTTPS, what it says is its own, as certificates
// have it: this is about a key.
func readOffer(ctx context.Context, server, keyFile string) (o offer, err error) {
	info, err := get(ctx, server, "nix-cache-info")
	if err == nil {
		err = checkStore(string(info))
	}
	if err != nil {
		err = fmt.Errorf("%s cannot be used as a substitute server: %w", mirror.WithoutUser(server), err)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w\nhint: is the medium plugged in, and the name right?", err)
		}
		return o, err
	}
	at, err := url.Parse(server)
	if err != nil {
		return o, err
	}
	for line := range strings.Lines(string(info)) {
		if urls, ok := strings.CutPrefix(line, "BlockStores: "); ok && at.Host != "" {
			o.stores = announced(at.Hostname(), strings.Fields(urls))
		}
	}
	for _, directory := range mirror.LocalDirectories(server) {
		blocks := filepath.Join(directory, "blocks")
		if _, err := os.Stat(blocks); err == nil {
			o.stores = []string{"file:" + (&url.URL{Path: blocks}).EscapedPath()}
		}
	}
	var text []byte
	switch keyFile {
	case "none":
		return o, nil
	case "":
		if text, err = get(ctx, server, "signing-key.pub"); err != nil {
			return o, fmt.Errorf("the server shows no key: %w\nhint: ask its administrator for signing-key.pub, and name it by --key=FILE; or use a mirror of servers that are authorised by --key=none", err)
		}
	default:
		if text, err = files.ReadLimited(keyFile, acl.MaxSexpSize); err != nil {
			return o, err
		}
	}
	if o.key, err = acl.ParsePublicKey(text); err == nil {
		err = o.key.Usable()
	}
	if err != nil {
		return o, fmt.Errorf("the key%s: %w\nhint: a key is a file as \"keygen\" makes it, signing-key.pub", strings.TrimSuffix(" of "+keyFile, " of "), err)
	}
	return o, nil
}

// checkStore looks whether a server, by what it says of itself, has items of the store of this
// machine. A login page has none, and what is for Nix is of no use.
func checkStore(info string) error {
	for line := range strings.Lines(info) {
		directory, ok := strings.CutPrefix(line, "StoreDir: ")
		if directory = strings.TrimSpace(directory); ok && directory != settings.StoreDirectory() {
			return fmt.Errorf("its items are for the store directory %q, and those of this machine are in %s", directory, settings.StoreDirectory())
		} else if ok {
			return nil
		}
	}
	return errors.New("its nix-cache-info names no store directory (StoreDir)")
}

// announced returns the stores of a server on the network. One without a host is on that of the
// server; what would be files or sockets of this machine, no server can know.
func announced(host string, urls []string) (stores []string) {
	for _, text := range urls[:min(len(urls), 16)] {
		u, err := storeurl.ParseListen(text)
		if err != nil || u.Scheme == "coap+unix" {
			continue
		}
		u.Host = cmp.Or(u.Host, strings.ToLower(host))
		stores = append(stores, u.String())
	}
	return stores
}

const maxOffer = 64 << 10

func get(ctx context.Context, server, name string) ([]byte, error) {
	var text []byte
	err := fs.ErrNotExist
	directories := mirror.LocalDirectories(server)
	for i := 0; i < len(directories) && errors.Is(err, fs.ErrNotExist); i++ {
		text, err = files.ReadRegular(filepath.Join(directories[i], name), maxOffer)
	}
	if len(directories) > 0 {
		return text, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = dial.With(&net.Dialer{})
	client := http.Client{Transport: transport, Timeout: 20 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/"+name, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if failed, ok := errors.AsType[*url.Error](err); ok {
		err = failed.Err // without the URL, which is said already
	}
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: status %d %s", name, response.StatusCode, http.StatusText(response.StatusCode))
		if to, none := response.Location(); none == nil {
			err = fmt.Errorf("%w\nhint: it leads elsewhere; if that is right, use %s", err, strings.TrimSuffix(to.String(), "/"+name))
		}
		return nil, err
	}
	text, err = io.ReadAll(io.LimitReader(response.Body, maxOffer+1))
	if err == nil && len(text) > maxOffer {
		err = fmt.Errorf("%s is longer than %d bytes", name, maxOffer)
	}
	return text, err
}
