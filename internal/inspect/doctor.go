// SPDX-License-Identifier: GPL-3.0-or-later

package inspect

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/mirror"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/confine"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/message"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/sourcestate"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

type finding struct {
	Subject string `json:"subject"`
	OK      bool   `json:"ok"`
	Detail  string `json:"detail"`
	// Mend is the commands that mend it, in lines, or empty.
	Mend string `json:"mend,omitempty"`
	// Data has the numbers of the detail, if there are any.
	Data any `json:"data,omitempty"`
}

type doctor struct {
	session.Settings
	root     string // of the system
	daemon   *daemonProcess
	findings []finding
}

func (d *doctor) well(subject, format string, a ...any) {
	d.findings = append(d.findings, finding{Subject: subject, OK: true, Detail: fmt.Sprintf(format, a...)})
}

func (d *doctor) ill(mend, subject, format string, a ...any) {
	d.findings = append(d.findings, illness(mend, subject, format, a...))
}

func illness(mend, subject, format string, a ...any) finding {
	return finding{Subject: subject, Detail: message.Text(fmt.Sprintf(format, a...)), Mend: mend}
}

// Doctor is the command that looks for what is not as it should be.
func Doctor() *cobra.Command {
	d := doctor{root: settings.SystemRoot()}
	c := &cobra.Command{
		Short: "look whether all is set up, and say what to mend",
		Long: `Look whether this program is set up: whether the running guix-daemon uses it,
and whether keys, directories, servers and stores are as they should be. What is
not comes with the command that mends it. Nothing is changed.

The environment of the daemon decides where it can be read: as root. The exit
status is 0 if all is well, else 1.`,
		Args: message.NoArguments,
	}
	asJSON := c.Flags().Bool("json", false, "print the findings as JSON")
	d.Flags(c.Flags())
	c.RunE = func(*cobra.Command, []string) error { return d.run(c.Context(), *asJSON) }
	return c
}

func (d *doctor) run(ctx context.Context, asJSON bool) error {
	d.examine(ctx)
	var worst message.Status
	if slices.ContainsFunc(d.findings, func(f finding) bool { return !f.OK }) {
		worst = message.Failed
	}
	if asJSON {
		return cmp.Or(page.JSON(d.findings), worst.Err())
	}
	p := page.New()
	showFindings(p, d.findings)
	return cmp.Or(p.Print(), worst.Err())
}

func showFindings(p *page.Page, findings []finding) {
	bads := 0
	for _, f := range findings {
		m := page.Good
		if !f.OK {
			m = page.Bad
			bads++
		}
		p.Say(0, m, "%s: %s", f.Subject, f.Detail)
		for line := range strings.Lines(f.Mend) {
			p.Command(6, strings.TrimSuffix(line, "\n"))
		}
	}
	if bads == 0 {
		p.Heading("All is well.")
		return
	}
	p.Heading(page.Count(bads, "thing") + " to mend, by the commands above.")
}

func (d *doctor) examine(ctx context.Context) {
	d.well("version", "guix-substitute-eris %s, %s, %s/%s", program.Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	d.examineDaemon()
	d.adoptEnvironment()
	d.LoadQuietly(d.daemon != nil && d.daemon.environment != nil)
	d.Adopt(d.daemon.options())
	d.LookAround()
	sub := d.SilentSession(false)
	defer sub.Close()
	if d.Confines() {
		d.well("confinement", "helpers confine themselves: %s", confine.InForce())
	} else {
		d.ill("sudo sed -i '/^[[:space:]]*confine[[:space:]]*=/d' "+page.Quote(settings.FileName()), "confinement", "helpers do not confine themselves: \"confine = false\" in %s", settings.FileName())
	}
	d.examineKeys()
	d.examineState()
	d.examineAhead()
	d.examineServing()
	d.examineSharing()
	stores := askStores(ctx, sub) // while servers are
	d.examineServers(ctx, sub)
	d.examineStores(stores())
	d.examineClock(time.Now())
}

// adoptEnvironment makes the environment of the daemon the one that counts, for what its helpers
// are told by it.
func (d *doctor) adoptEnvironment() {
	if d.daemon == nil || d.daemon.environment == nil {
		return
	}
	for _, name := range []string{settings.StoreVariable, "XDG_CACHE_HOME"} {
		ours, theirs := os.Getenv(name), d.daemon.environment[name]
		if name == settings.StoreVariable && ours != "" && ours != theirs {
			d.ill("unset "+settings.StoreVariable+"\nsudo editor "+page.Quote(settings.FileName())+" # eris-stores = [\"URL\"]", "environment", "%s is set here, but the daemon has another value, or none", settings.StoreVariable)
		}
		os.Setenv(name, theirs)
	}
	for _, name := range []string{"NIX_STORE_DIR", "GUIX_STATE_DIRECTORY", "GUIX_CONFIGURATION_DIRECTORY", "http_proxy", "https_proxy", "no_proxy"} {
		if value, ok := d.daemon.environment[name]; ok {
			os.Setenv(name, value)
		}
	}
}

// has reports whether the system has a file.
func (d *doctor) has(name string) bool {
	_, err := os.Lstat(filepath.Join("/", d.root, name))
	return err == nil
}

// either returns system where services are those of Guix System, and not of systemd, else other.
func (d *doctor) either(other, system string) string {
	if d.has("run/current-system/profile/bin/herd") {
		return system
	}
	return other
}

func (d *doctor) examineKeys() {
	name := d.KeysFile()
	text, err := files.ReadRegular(name, acl.MaxSexpSize)
	var keys *acl.ACL
	if err == nil {
		keys, err = acl.ParseACL(text)
	}
	authorise := "sudo guix archive --authorize < KEY-OF-A-SERVER.pub"
	if known, _ := filepath.Glob(filepath.Join("/", d.root, "var/guix/profiles/per-user/root/current-guix/share/guix/*.guix.gnu.org.pub")); len(known) > 0 {
		authorise = "sudo guix archive --authorize < " + strings.Join(known, "\nsudo guix archive --authorize < ")
	}
	switch {
	case err != nil:
		d.ill(authorise, "authorised keys", "%s: %v", name, err)
	case d.unreadable("authorised keys", name):
	case !d.HasForeignKeys(keys):
		d.ill(authorise, "authorised keys", "%s authorises no other machine, so that no substitute counts", name)
	default:
		d.well("authorised keys", "%s in %s", page.Count(len(keys.Keys()), "key"), name)
	}
	if d.Unauthorised {
		d.ill("unset GUIX_ALLOW_UNAUTHENTICATED_SUBSTITUTES", "authorised keys", "signatures do not count, by the settings: anybody on the network can replace substitutes")
	}
	secret := filepath.Join(settings.Directory(), "signing-key.sec")
	info, err := os.Stat(secret)
	switch {
	case err != nil: // which is well on a machine that publishes nothing
	case info.Mode().Perm()&0o077 != 0:
		d.ill("sudo chmod 400 "+page.Quote(secret), "signing key", "%s can be read by others than its owner", secret)
	default:
		d.well("signing key", "%s", secret)
	}
	if d.Wrong != nil {
		d.ill("sudo editor "+page.Quote(settings.FileName()), "configuration", "%s", strings.TrimPrefix(d.Wrong.Error(), "configuration ignored: "))
	} else if _, err := os.Stat(settings.FileName()); err != nil {
		d.well("configuration", "there is no %s, and none is needed", settings.FileName())
	} else if !d.unreadable("configuration", settings.FileName()) {
		d.well("configuration", "%s", settings.FileName())
	}
}

// unreadable reports whether there is a file that the daemon may not read, and says so.
func (d *doctor) unreadable(subject, name string) bool {
	who, directory := d.helper(), filepath.Dir(name)
	above, err := os.Stat(directory)
	info, err2 := os.Stat(name)
	if err != nil || err2 != nil || who.may(above, 1) && who.may(info, 4) {
		return false
	}
	d.ill("sudo chmod a+rX "+page.Quote(directory)+" "+page.Quote(name), subject, "the daemon, as user %s, may not read %s", userName(who.uid), name)
	return true
}

// How many bytes should be free for the store, and for what is kept for later.
const (
	leastFree = 1 << 30
	leastKept = 16 << 20
)

func (d *doctor) examineState() {
	directory, who := d.KeepDirectory(), d.helper()
	if d.daemon != nil && d.daemon.environment == nil {
		who = ourselves() // whose directory it is, as that of the daemon is not known
	}
	if directory == "" {
		d.well("cache", "nothing is kept for later, by the settings")
	} else if existing, err := writable(directory, who); errors.Is(err, errForeign) {
		d.ill("sudo rm -r "+page.Quote(directory), "cache", "narinfos and blocks cannot be kept for later: %v", err)
	} else if err != nil {
		d.ill(fmt.Sprintf("sudo install -d -o %d %s", who.uid, page.Quote(directory)), "cache", "narinfos and blocks cannot be kept for later: %v", err)
	} else if room, err := files.RoomIn(existing); err == nil && !room.Holds(leastKept) {
		d.ill("rm -r "+page.Quote(directory)+" # or name another cache-directory", "cache", "%s: only %s are free, or hardly any more files, so that little is kept for later", directory, page.Size(room.Free))
	} else {
		d.well("cache", "%s", directory)
	}
	for _, place := range []struct{ subject, path string }{{"store", d.Store}, {"state", settings.StateDirectory()}} {
		switch room, err := files.RoomIn(place.path); {
		case err != nil:
			d.ill("sudo mkdir -p "+page.Quote(place.path), place.subject, "%v", err)
		case room.Free < leastFree:
			d.ill("guix gc -F 5G", place.subject, "%s: only %s are free", place.path, page.Size(room.Free))
		case !room.Holds(leastKept):
			d.ill("df -i "+page.Quote(place.path)+"\nguix gc", place.subject, "%s: its file system takes hardly any more files", place.path)
		default:
			d.well(place.subject, "%s, %s free", place.path, page.Size(room.Free))
		}
	}
}

func (d *doctor) examineAhead() {
	directory := d.KeepDirectory()
	a := sourcestate.ReadAhead(filepath.Join(directory, "sources"))
	if directory == "" || a.Since.IsZero() {
		return
	}
	d.well("ahead of the daemon", "%s staged, %d used, %s wasted, since %s",
		page.Count(int(a.Staged), "item"), a.Used, page.Size(max(0, a.StagedBytes-a.UsedBytes)), a.Since.Format(time.DateOnly))
	d.findings[len(d.findings)-1].Data = a
}

// examineServing looks for servers that were started before the program was replaced.
func (d *doctor) examineServing() {
	programs, _ := filepath.Glob(filepath.Join("/", d.root, "proc/[0-9]*/exe"))
	for _, exe := range programs {
		if name, _ := os.Readlink(exe); filepath.Base(name) != "guix-substitute-eris (deleted)" {
			continue
		}
		text, _ := files.ReadRegular(filepath.Join(filepath.Dir(exe), "cmdline"), maxProcessFile)
		_, arguments, _ := strings.Cut(string(text), "\x00")
		command, _, _ := strings.Cut(arguments, "\x00")
		unit := map[string]string{"serve": "guix-substitute-eris.service", "publish": "guix-substitute-eris-publish.service"}[command]
		if unit == "" {
			continue
		}
		process := filepath.Base(filepath.Dir(exe))
		mend := "sudo kill " + process + " # and start it again"
		if d.has("run/systemd/units/invocation:" + unit) {
			mend = "sudo systemctl restart " + unit
		}
		d.ill(mend, command, "process %s is still of the program that was there before this one", process)
	}
}

// examineSharing looks whether the publisher runs, where systemd is to start it.
func (d *doctor) examineSharing() {
	const unit = "guix-substitute-eris-publish.service"
	switch {
	case !d.has("etc/systemd/system/multi-user.target.wants/" + unit):
	case d.has("run/systemd/units/invocation:" + unit):
		d.well("sharing", "the publisher runs")
	default:
		d.ill("sudo systemctl start "+unit, "sharing", "the publisher does not run, so that others get nothing from here")
	}
}

// writable returns the first directory that exists, of one for state and those above it, and an
// error that says why a user cannot keep anything there. State of others is not used.
func writable(directory string, who credentials) (existing string, err error) {
	for existing = directory; ; existing = filepath.Dir(existing) {
		info, err := os.Stat(existing)
		switch {
		case os.IsNotExist(err) && existing != filepath.Dir(existing):
			continue
		case err != nil:
			return existing, err
		case !info.IsDir():
			return existing, &fs.PathError{Op: "open", Path: existing, Err: unix.ENOTDIR}
		case existing == directory && info.Sys().(*syscall.Stat_t).Uid != uint32(who.uid):
			return existing, fmt.Errorf("%s: %w than %s", existing, errForeign, userName(who.uid))
		case !who.may(info, 2):
			return existing, fmt.Errorf("user %s may not write to %s", userName(who.uid), existing)
		}
		return existing, nil
	}
}

var errForeign = errors.New("it belongs to another user")

type credentials struct {
	uid    int
	groups []int
}

// may reports whether a process may do something with a file: 4 is to read it, 2 to write to it,
// and 1 to use what is in a directory.
func (c credentials) may(info fs.FileInfo, what fs.FileMode) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok || c.uid == 0:
		return true
	case int(stat.Uid) == c.uid:
		what <<= 6
	case slices.Contains(c.groups, int(stat.Gid)):
		what <<= 3
	}
	return info.Mode()&what == what
}

// userName is a user as people know it, or its number.
func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return strconv.Itoa(uid)
}

func groupName(gid int) string {
	if g, err := user.LookupGroupId(strconv.Itoa(gid)); err == nil {
		return g.Name
	}
	return strconv.Itoa(gid)
}

func (d *doctor) helper() credentials {
	if d.daemon != nil {
		return d.daemon.credentials
	}
	return ourselves()
}

func ourselves() credentials {
	groups, _ := os.Getgroups() // none is none
	return credentials{os.Geteuid(), append(groups, os.Getegid())}
}

func (d *doctor) examineServers(ctx context.Context, sub *session.Session) {
	urls := d.ServerURLs()
	if len(urls) == 0 {
		d.ill("sudo guix-daemon --substitute-urls='"+strings.Join(session.DefaultURLs, " ")+"' …", "server", "none is configured")
	}
	results := make([]finding, len(urls))
	var wait sync.WaitGroup
	for i, url := range urls {
		wait.Go(func() { results[i] = examineServer(ctx, sub.Mirrors, url) })
	}
	wait.Wait()
	for i, url := range urls {
		if results[i].OK && slices.ContainsFunc(mirror.LocalDirectories(url), d.unseen) {
			results[i] = illness("sudo systemctl restart guix-daemon", results[i].Subject, "guix-daemon does not see what was plugged in after it had started")
		}
	}
	d.findings = append(d.findings, results...)
}

// unseen reports whether what is in a directory is not there for the daemon: by the service of Guix
// 1.5, it keeps the mounts of when it was started (MountFlags=private).
func (d *doctor) unseen(directory string) bool {
	if d.daemon == nil {
		return false
	}
	root := filepath.Join("/", d.root, "proc", strconv.Itoa(d.daemon.pid), "root")
	_, err := os.Stat(root)
	ours, _ := os.Stat(directory)
	theirs, _ := os.Stat(filepath.Join(root, directory))
	return err == nil && ours != nil && (theirs == nil || !os.SameFile(ours, theirs))
}

const absent = "00000000000000000000000000000000"

func examineServer(ctx context.Context, mirrors *mirror.Client, url string) finding {
	name := "server " + mirror.WithoutUser(url)
	ctx, cancel := context.WithTimeoutCause(ctx, 2*probeTimeout, fmt.Errorf("no answer in %v", 2*probeTimeout))
	defer cancel()
	if err := mirror.CheckURL(url); err != nil {
		edit := "sudo systemctl edit --full guix-daemon # --substitute-urls=…"
		if text, _ := files.ReadRegular(settings.FileName(), 1<<20); bytes.Contains(text, []byte(url)) {
			edit = "sudo editor " + page.Quote(settings.FileName())
		}
		return illness(edit, name, "%v", err)
	}
	var answer mirror.Answer
	begin := time.Now()
	err := mirrors.Narinfos(ctx, url, []string{absent}, mirror.Wanted, func(a mirror.Answer) { answer = a })
	took := time.Since(begin)
	look := "curl -I " + page.Quote(mirror.WithoutUser(url)+"/nix-cache-info")
	if directories := mirror.LocalDirectories(url); len(directories) > 0 {
		look = "ls " + page.Quote(directories[len(directories)-1]) + " # is the medium plugged in?"
	}
	switch {
	case missing(url):
		return illness(look, name, "nothing is there")
	case err != nil:
		return illness(look, name, "%s", unnamed(mirror.WithoutUser(url), err.Error()))
	case answer.Unfollowed != nil, answer.Status >= 400 && answer.Status != http.StatusNotFound && answer.Status != http.StatusGone:
		return illness(look, name, "answers with %s", answer.StatusText())
	}
	return finding{Subject: name, OK: true, Detail: "answers (" + page.Duration(took) + ")"}
}

func (d *doctor) examineStores(reports []storeReport) {
	urls := d.StoreURLs()
	if len(urls)+len(reports) == 0 {
		d.well("block stores", "none is configured; substitutes come as nars")
	}
	for _, url := range urls {
		d.examineSocket(url)
	}
	if len(reports) == 0 && len(urls) > 0 && d.Policy != substitute.HTTPOnly {
		d.ill("sudo editor "+page.Quote(settings.FileName()), "block stores", "none of them can be opened")
	}
	for _, r := range reports {
		subject := "block store " + r.URL
		switch {
		case strings.HasPrefix(r.URL, "cache:"):
		case r.Found: // and may have left
			d.well(subject, "found on the local network; %s", cmp.Or(r.Failure, "answers ("+page.Duration(r.Latency)+")"))
		case settings.IsSocket(r.URL) && os.Geteuid() != 0 && strings.HasSuffix(r.Failure, unix.EACCES.Error()):
			d.well(subject, "is there, and not for this user")
		case strings.HasPrefix(r.URL, "file:") && r.Failure != "":
			d.ill("sudo editor "+page.Quote(settings.FileName())+" # or plug the medium in", subject, "%s", r.Failure)
		case r.Failure != "" && settings.IsSocket(r.URL):
			const unit = "guix-substitute-eris.socket"
			start := "guix-substitute-eris serve # as a user of its own"
			for _, directory := range []string{"etc", "usr/local/lib", "usr/lib", "lib"} {
				if d.has(directory + "/systemd/system/" + unit) {
					start = "sudo systemctl start " + unit
				}
			}
			d.ill(d.either(start, "sudo herd start eris-block-store"), subject, "%s", r.Failure)
		case r.Failure != "":
			d.ill("guix-substitute-eris serve --listen=… # on that machine", subject, "%s", r.Failure)
		default:
			d.well(subject, "answers (%s)", page.Duration(r.Latency))
		}
	}
}

func (d *doctor) examineSocket(url string) {
	u, err := storeurl.Parse(url)
	if err != nil {
		d.ill("sudo editor "+page.Quote(settings.FileName()), "block store", "%v", err)
		return
	}
	if u.Scheme != "coap+unix" {
		return
	}
	info, err := os.Stat(u.Host)
	if who := d.helper(); err == nil && !who.may(info, 2) {
		stat := info.Sys().(*syscall.Stat_t)
		mend := "sudo chmod o+w " + page.Quote(u.Host)
		if len(who.groups) > 0 {
			mend = fmt.Sprintf("sudo chgrp %[1]d %[2]s # for good: serve --socket-group=%[1]d", who.groups[0], page.Quote(u.Host))
		}
		if system, _ := settings.DefaultSocket(0, ""); u.Host == system {
			mend = "sudo guix-substitute-eris setup"
		}
		mend = d.either(mend, "sudo editor /etc/config.scm # (listen '(\"coap+unix:///run/guix-substitute-eris/get.sock?get\")), and see docs/guide-guix-system.md")
		d.ill(mend, "block store "+url,
			"the daemon, as user %s, may not connect to it: the socket is for the group %s", userName(who.uid), groupName(int(stat.Gid)))
	}
}

// made is when there was no program of this kind yet.
var made = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

func (d *doctor) examineClock(now time.Time) {
	if now.Before(made) {
		d.ill("sudo timedatectl set-ntp true", "clock", "it is %s by the clock, and this program was made after %s", now.Format(time.DateTime), made.Format(time.DateOnly))
		return
	}
	d.well("clock", "%s", now.Format("2006-01-02 15:04"))
}
