// SPDX-License-Identifier: GPL-3.0-or-later

package inspect

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/program"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/session"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/settings"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/setup"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/protocol"
	"golang.org/x/sys/unix"
)

type daemonProcess struct {
	pid         int
	program     string // its file name; empty if that cannot be read
	arguments   []string
	environment map[string]string // nil if it cannot be read
	credentials credentials
	confinement string // by AppArmor; empty if there is none
}

// maxProcessFile bounds the length of what is read of a process, in bytes.
const maxProcessFile = 4 << 20

// findDaemon returns the running guix-daemon and no child of it, or nil. Anybody can give a process
// that name; those count of users that are trusted, real and effective ones.
func (d *doctor) findDaemon() *daemonProcess {
	proc := filepath.Join("/", d.root, "proc")
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	parents := map[int]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		status := statusOf(filepath.Join(proc, e.Name()))
		// Both users must be trusted: the real one too, because a set-user-ID program may be
		// started under any name.
		users := status["Uid"]
		if slices.Equal(status["Name"], []string{"guix-daemon"}) && len(users) > 1 && d.trusts(users[0]) && d.trusts(users[1]) {
			parents[pid], _ = strconv.Atoi(strings.Join(status["PPid"], ""))
		}
	}
	var first []int
	for pid, parent := range parents {
		if _, child := parents[parent]; !child {
			first = append(first, pid)
		}
	}
	if len(first) == 0 {
		return nil
	}
	return readDaemon(proc, slices.Min(first))
}

// statusOf returns the words in the lines about a process, by their names (proc_pid_status(5)).
func statusOf(directory string) map[string][]string {
	status := map[string][]string{}
	text, _ := files.ReadRegular(filepath.Join(directory, "status"), maxProcessFile)
	for line := range strings.Lines(string(text)) {
		name, words, _ := strings.Cut(line, ":")
		status[name] = strings.Fields(words)
	}
	return status
}

// credentialsOf returns what a process may do, by its effective user and group and the other
// groups.
func credentialsOf(status map[string][]string) (c credentials) {
	numbers := func(name string) (list []int) {
		for _, word := range status[name] {
			n, _ := strconv.Atoi(word) // the kernel writes numbers
			list = append(list, n)
		}
		return list
	}
	if users, groups := numbers("Uid"), numbers("Gid"); len(users) > 1 && len(groups) > 1 {
		c = credentials{users[1], append(groups[1:2:2], numbers("Groups")...)}
	}
	return c
}

// trusts reports whether a daemon may be one of the user: root, or whoever owns the store.
func (d *doctor) trusts(uid string) bool {
	var store unix.Stat_t
	err := unix.Stat(settings.StoreDirectory(), &store)
	return uid == "0" || d.root != "" || err == nil && uid == strconv.Itoa(int(store.Uid))
}

func readDaemon(proc string, pid int) *daemonProcess {
	d := &daemonProcess{pid: pid}
	in := func(name string) string { return filepath.Join(proc, strconv.Itoa(pid), name) }
	program, _ := os.Readlink(in("exe"))
	d.program = strings.TrimSuffix(program, " (deleted)")
	if text, err := files.ReadRegular(in("cmdline"), maxProcessFile); err == nil {
		d.arguments = strings.Split(string(text), "\x00")
	}
	if text, err := files.ReadRegular(in("environ"), maxProcessFile); err == nil {
		d.environment = map[string]string{}
		for variable := range strings.SplitSeq(string(text), "\x00") {
			if name, value, ok := strings.Cut(variable, "="); ok {
				d.environment[name] = value
			}
		}
	}
	d.credentials = credentialsOf(statusOf(in("")))
	confinement, _ := files.ReadRegular(in("attr/current"), maxProcessFile)
	d.confinement = strings.TrimSpace(strings.Trim(string(confinement), "\x00"))
	return d
}

// options returns what the daemon tells its helpers of its arguments, of which the last one counts
// (Guix, nix/nix-daemon/guix-daemon.cc: parse_opt), nothing if there is no daemon.
func (d *daemonProcess) options() protocol.Options {
	options := protocol.Options{}
	if d == nil {
		return options
	}
	for i, argument := range d.arguments {
		switch name, value, here := strings.Cut(argument, "="); name {
		case "--substitute-urls":
			// The service of Guix System gives the value as an argument of its own.
			if next := i + 1; !here && next < len(d.arguments) {
				value = d.arguments[next]
			}
			options["substitute-urls"] = value
		case "--discover":
			options["discover"] = strconv.FormatBool(value != "no")
		}
	}
	return options
}

// Load reads the settings, as [session.Settings.Load] does, for a command that somebody runs by
// hand: what the running daemon tells its helpers counts there, too. It reports whether the servers
// are guessed: nobody says which the daemon asks.
func Load(s *session.Settings) (guessed bool, err error) {
	err = s.Load()
	if _, told := os.LookupEnv("_NIX_OPTIONS"); err != nil || told {
		return false, err
	}
	d := doctor{root: settings.SystemRoot()}
	daemon := d.findDaemon()
	s.Adopt(daemon.options())
	return daemon == nil && s.URLs == "", nil
}

// examineDaemon finds out whether the running daemon starts this program.
func (d *doctor) examineDaemon() {
	d.daemon = d.findDaemon()
	p := d.daemon
	if p == nil {
		start := d.either("sudo systemctl start guix-daemon",
			"sudo herd start guix-daemon && guix build -n hello # the first client has it started")
		why, guix := "it does not run", []string{
			"run/current-system", "var/guix/profiles/per-user/root/current-guix", "usr/bin/guix-daemon", "usr/local/bin/guix-daemon",
			"etc/systemd/system/guix-daemon.service", "lib/systemd/system/guix-daemon.service",
		}
		if !slices.ContainsFunc(guix, d.has) {
			start = "# install Guix first, as its manual says: https://guix.gnu.org/manual/en/html_node/Installation.html"
			why += ", and Guix is not installed"
		}
		d.ill(start, "guix-daemon", "%s", why)
		return
	}
	d.well("guix-daemon", "process %d, user %s, %s", p.pid, userName(p.credentials.uid), cmp.Or(p.program, "of a program that cannot be seen"))
	if p.environment == nil {
		d.ill("sudo guix-substitute-eris doctor", "in use", "the environment of the daemon can be read by root only, so that it is not known")
		return
	}
	program, how, err := d.usedProgram()
	if err != nil {
		mend := d.plugIn()
		if errors.Is(err, errNotRestarted) {
			mend = "sudo systemctl daemon-reload && sudo systemctl restart guix-daemon"
		}
		d.ill(mend, "in use", "%v", err)
		return
	}
	d.well("in use", "%s: %s", how, program)
	d.examineConfinement(program, strings.HasPrefix(how, "as an extension"))
}

func (d *doctor) plugIn() string {
	return d.either("sudo guix-substitute-eris setup",
		"sudo editor /etc/config.scm # (modify-services … (guix-service-type config => (with-substitute-eris config)))\n"+
			"sudo guix system reconfigure -L etc/guix /etc/config.scm && sudo herd restart guix-daemon")
}

// usedProgram returns the program that the daemon's helpers are, and how the daemon comes to it; or
// why it is not this one.
func (d *doctor) usedProgram() (program, how string, err error) {
	env := d.daemon.environment
	for directory := range strings.SplitSeq(env["GUIX_EXTENSIONS_PATH"], ":") {
		file := filepath.Join(directory, "substitute.scm")
		text, err := files.ReadRegular(file, 1<<20)
		if directory == "" || err != nil || !bytes.Contains(text, []byte("guix-substitute-eris")) {
			continue
		}
		if !strings.HasSuffix(filepath.Clean(directory), "/guix/extensions") {
			return "", "", errors.New("Guix finds no extensions in " + directory + ": the name must end in /guix/extensions")
		}
		program = cmp.Or(env["GUIX_SUBSTITUTE_ERIS"], setup.Program)
		if m := regexp.MustCompile(`"(/[^"\s]*/guix-substitute-eris)"`).FindSubmatch(text); m != nil && env["GUIX_SUBSTITUTE_ERIS"] == "" {
			program = string(m[1])
		}
		return program, "as an extension, " + file, d.checkProgram(program)
	}
	guix := env["GUIX"]
	if guix != "" && d.checkProgram(guix) == nil {
		return guix, "in place of guix (GUIX)", nil
	}
	if env["GUIX_EXTENSIONS_PATH"] != "" {
		return "", "", errors.New("there is no substitute.scm of this program in " + env["GUIX_EXTENSIONS_PATH"] + " (GUIX_EXTENSIONS_PATH)")
	}
	_, service := setup.ReadService(filepath.Join("/", d.root), "etc/systemd/system/guix-daemon.service", "")
	for _, name := range []string{"GUIX_EXTENSIONS_PATH", "GUIX"} {
		if set := service[name]; set != "" && env[name] == "" {
			return "", "", fmt.Errorf("the service sets %s=%s, and %w", name, set, errNotRestarted)
		}
	}
	if set := service["GUIX"]; set != "" && guix != set {
		return "", "", errors.New("the service sets GUIX=" + set + ", but the daemon has GUIX=" + guix +
			": the guix-daemon of \"guix pull\" is a wrapper that sets it itself; use the extension")
	}
	if guix != "" {
		return "", "", errors.New("the daemon starts " + guix + " (GUIX), which is not this program")
	}
	return "", "", errors.New("the daemon has neither GUIX_EXTENSIONS_PATH nor GUIX in its environment, so that it uses Guix's own helper")
}

func (d *doctor) checkProgram(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case info.Mode().Perm()&0o111 == 0:
		return errors.New(path + " is not executable")
	}
	self, err := os.Stat("/proc/self/exe")
	if err == nil && os.SameFile(info, self) || program.IsOurs(path) {
		return nil
	}
	return errors.New(path + " is not this program")
}

var errNotRestarted = errors.New("the running daemon does not have it: it was not restarted since")

// examineConfinement looks whether AppArmor lets the daemon run the program. The profile of Guix
// lets the daemon run none but Guix's own, and an extension those of the store only (Guix,
// etc/apparmor.d/guix-daemon).
func (d *doctor) examineConfinement(program string, extension bool) {
	profile, enforced := strings.CutSuffix(d.daemon.confinement, " (enforce)")
	if !enforced {
		return
	}
	const local = "etc/apparmor.d/local/guix-daemon"
	rules, _ := files.ReadRegular(filepath.Join("/", d.root, local), 1<<20)
	if extension && strings.HasPrefix(program, settings.StoreDirectory()+"/") || !extension && bytes.Contains(rules, []byte(program)) {
		d.well("AppArmor", "the profile %s is in force and permits it", profile)
		return
	}
	mend, permitted := "sudo guix-substitute-eris setup", "programs of Guix only"
	if extension { // which runs with other rights than the daemon, that no file of the site adds to
		mend = "make dist && guix build -L etc/guix guix-substitute-eris --root=/var/guix/gcroots/guix-substitute-eris\n" +
			"sudo /var/guix/gcroots/guix-substitute-eris/bin/guix-substitute-eris setup"
		permitted = "programs in the store only"
	}
	d.ill(mend, "AppArmor", "the profile %s is in force and lets the daemon run %s", profile, permitted)
}
