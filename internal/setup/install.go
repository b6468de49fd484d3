// SPDX-License-Identifier: GPL-3.0-or-later

package setup

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/etc"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// Files of the system.
const (
	// Program is where the program is put if it is in no directory for programs, and where the
	// files of package etc have it.
	Program = "/usr/local/bin/guix-substitute-eris"

	storeURL       = "coap+unix:///run/guix-substitute-eris/eris.sock" // of the system
	extensions     = "/etc/guix/extensions"
	account        = "guix-substitute-eris"
	units          = "/etc/systemd/system"
	apparmorParser = "apparmor_parser"
	dropIn         = units + "/guix-daemon.service.d/guix-substitute-eris.conf"
	socketDropIn   = units + "/guix-substitute-eris.socket.d/guix-daemon.conf"
)

// ErrGuixSystem says that the system is made from a declaration, to which services are added.
var ErrGuixSystem = errors.New("this is Guix System, which is set up by its declaration")

// Options say what is installed.
type Options struct {
	// Program is the absolute file name of the running program.
	Program string
	// Way is how guix-daemon comes to it: "extension", "program", or empty for what suits the
	// daemon.
	Way string
	// RealGuix is the guix that "program" hands other commands to; without one that way is not
	// taken unless Way says so.
	RealGuix string
	// Store is whether a block store is set up, and Share, which needs it, whether others may use
	// it and the items of this machine, over the network.
	Store, Share bool
}

// An installation gathers steps.
type installation struct {
	*System
	o       Options
	steps   []Step
	notes   []string
	program string
	started []string // units to start
}

// Install returns the steps that put the program in place, without those that are done already, and
// what a person has to do in addition. The error is ErrGuixSystem where nothing can be done.
func (s *System) Install(o Options) (steps []Step, notes []string, err error) {
	if s.GuixSystem() {
		return nil, nil, ErrGuixSystem
	}
	i := &installation{System: s, o: o}
	for _, part := range []func() error{i.installProgram, i.installStore, i.installShare, i.installHelper, i.finish} {
		if err := part(); err != nil {
			return nil, nil, err
		}
	}
	steps, err = s.planned(i.steps)
	return steps, i.notes, err
}

// GuixSystem reports whether the system is made from a declaration.
func (s *System) GuixSystem() bool {
	text, _ := files.ReadRegular(filepath.Join(s.root, "etc/os-release"), maxFile) // none says nothing
	return s.exists("/run/current-system/profile/bin/guix") || regexp.MustCompile(`(?m)^ID="?guix"?$`).Match(text)
}

// put adds a step unless the file is as it should be.
func (i *installation) put(step Step) error {
	now, err := i.now(step.Path)
	if err == nil && now != stateOf(step.Text, step.Link) {
		i.steps = append(i.steps, step)
	}
	return err
}

func (i *installation) note(format string, a ...any) {
	i.notes = append(i.notes, fmt.Sprintf(format, a...))
}

// installProgram puts a copy of the program where users cannot change it, unless it is in such a
// place.
func (i *installation) installProgram() error {
	i.program = i.o.Program
	if i.root == "/" && regexp.MustCompile(`^/(usr|opt|gnu/store|nix/store)/`).MatchString(i.program) {
		return nil
	}
	text, err := os.ReadFile(i.program)
	if err != nil {
		return err
	}
	i.program = Program
	return i.put(Step{Path: Program, Text: text, Mode: 0o755})
}

// text returns a file of package etc that names the program where it is.
func (i *installation) text(name string) ([]byte, error) {
	text, err := etc.File(name)
	return bytes.ReplaceAll(text, []byte(Program), []byte(i.program)), err
}

// systemd reports whether services are those of systemd.
func (i *installation) systemd() bool {
	return i.live || i.root != "/" && (i.exists(units) || i.exists("/usr/lib/systemd/system") || i.exists("/lib/systemd/system"))
}

// installed returns where a package, or "make install", has put a file below lib; or nothing.
func (i *installation) installed(name string) string {
	if name == "" {
		return ""
	}
	for _, prefix := range []string{"/usr/local/lib", "/usr/lib", "/lib"} {
		if i.exists(path.Join(prefix, name)) {
			return path.Join(prefix, name)
		}
	}
	return ""
}

// putText puts a file of package etc in place, and returns where it is: where it is installed below
// lib by that name, if it has one, or in a directory.
func (i *installation) putText(name, installed, directory string) (file string, err error) {
	if file = i.installed(installed); file != "" {
		return file, nil
	}
	text, err := i.text(name)
	if err != nil {
		return "", err
	}
	file = path.Join(directory, path.Base(name))
	return file, i.put(Step{Path: file, Text: text, Mode: 0o644})
}

// unit puts a unit in place and, unless wantedBy is empty, has it started with that target.
func (i *installation) unit(name, wantedBy string) error {
	file, err := i.putText("systemd/"+name, "systemd/system/"+name, units)
	if err != nil || wantedBy == "" {
		return err
	}
	i.started = append(i.started, name)
	return i.put(Step{Path: path.Join(units, wantedBy+".wants", name), Link: file})
}

// installStore sets the block store up, which the first client starts.
func (i *installation) installStore() error {
	if !i.o.Store {
		return nil
	}
	if !i.systemd() {
		i.note("no systemd is here: have your service manager run \"%s serve\" as a user of its own, with --socket-group for those who put blocks", i.program)
	} else if err := i.installService(); err != nil {
		return err
	}
	steps, err := i.configure(i.steps, [2]string{"eris-stores", storeURL})
	i.steps = steps
	return err
}

// installService has the user and the group of the store made, at once or when the system starts,
// and puts its units in place.
func (i *installation) installService() error {
	const name = "sysusers.d/guix-substitute-eris.conf"
	file, err := i.putText(name, name, "/etc/sysusers.d")
	if err != nil {
		return err
	}
	if _, err := user.Lookup(account); i.live && err != nil {
		i.steps = append(i.steps, Step{Command: []string{"systemd-sysusers", file}, Undo: []string{"userdel", account}})
	}
	return cmp.Or(i.unit("guix-substitute-eris.service", ""), i.unit("guix-substitute-eris.socket", "sockets.target"))
}

// installShare lets others have blocks and items over the network.
func (i *installation) installShare() error {
	if !i.o.Share {
		return nil
	}
	if !i.exists("/etc/guix/signing-key.sec") {
		if i.exists(publicKeyFile) {
			return fmt.Errorf("%s is there without signing-key.sec, and others may trust it\nhint: put the private key beside it, or move the public one away", publicKeyFile)
		}
		key := acl.GenerateSigningKey()
		// The private one first: a public key without it is of no use.
		i.steps = append(i.steps,
			Step{Path: "/etc/guix/signing-key.sec", Text: []byte(key.SecretText()), Mode: 0o400, Keep: true},
			Step{Path: publicKeyFile, Text: []byte(key.PublicKey().Text()), Mode: 0o444, Keep: true})
	}
	if !i.systemd() {
		i.note("no systemd is here: have your service manager run \"%[1]s serve --listen=coap+tcp://:5683\" and \"%[1]s publish --listen=:8080 --store=%[2]s --announce=coap+tcp://:5683\"", i.program, storeURL)
		return nil
	}
	if err := i.unit("guix-substitute-eris-network.socket", "sockets.target"); err != nil {
		return err
	}
	i.note("others use this machine by \"sudo guix-substitute-eris use http://ADDRESS:8080\"; a firewall must let TCP through to the ports 8080 and 5683")
	return i.unit("guix-substitute-eris-publish.service", "multi-user.target")
}

// A daemon is what the service of guix-daemon says.
type daemon struct {
	unit       string // its file; empty if there is none
	program    bool   // it is the daemon itself, and no wrapper, which would set GUIX
	user       string // it runs as; empty is root
	extensions string // the value of GUIX_EXTENSIONS_PATH, but for ours
}

func (i *installation) daemon() daemon {
	const name = "guix-daemon.service"
	d := daemon{unit: path.Join(units, name)}
	if !i.exists(d.unit) {
		if d.unit = i.installed("systemd/system/" + name); d.unit == "" {
			return d
		}
	}
	said, environment := ReadService(i.root, d.unit, path.Base(dropIn))
	d.user, d.extensions = said["User"], environment["GUIX_EXTENSIONS_PATH"]
	if fields := strings.Fields(said["ExecStart"]); len(fields) > 0 {
		d.program = i.isProgram(strings.TrimLeft(fields[0], "@-:+!"))
	}
	return d
}

// ReadService returns what the unit of a service of systemd and the drop-ins of the administrator,
// but for one by that name, say on the system at root, and the variables that they set, by name;
// what stands last counts, and what cannot be read says nothing.
func ReadService(root, unit, but string) (said, environment map[string]string) {
	said, environment = map[string]string{}, map[string]string{}
	comments := regexp.MustCompile(`(?m)^[ \t]*[#;].*\n`)
	names, _ := filepath.Glob(filepath.Join(root, units, path.Base(unit)+".d", "*.conf")) // the pattern is right
	for _, name := range append([]string{filepath.Join(root, unit)}, names...) {
		if filepath.Base(name) == but {
			continue
		}
		text, _ := files.ReadRegular(name, maxFile)
		text = comments.ReplaceAll(text, nil)
		text = bytes.ReplaceAll(text, []byte("\\\n"), []byte(" ")) // lines that go on (systemd.syntax(7))
		for line := range strings.Lines(string(text)) {
			setting, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			said[setting] = value
			if setting != "Environment" {
				continue
			} else if value == "" {
				clear(environment) // what stands before does not count
			}
			for _, word := range strings.FieldsFunc(value, func(r rune) bool { return strings.ContainsRune(" \t\"'", r) }) {
				variable, value, _ := strings.Cut(word, "=")
				environment[variable] = value
			}
		}
	}
	return said, environment
}

// isProgram reports whether a file is a program of the machine, and no script.
func (i *installation) isProgram(name string) bool {
	f, _, err := files.OpenRegular(filepath.Join(i.root, name), os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	magic := make([]byte, 4)
	f.Read(magic) // a short file is none
	return string(magic) == "\x7fELF"
}

// installHelper has guix-daemon start the program in place of "guix substitute".
func (i *installation) installHelper() error {
	d := i.daemon()
	way := i.o.Way
	if way == "" {
		way = "extension"
		if d.program && i.o.RealGuix != "" {
			way = "program"
		}
	}
	variable := "GUIX=" + i.program
	if way == "extension" {
		if _, err := i.putText("daemon/guix/extensions/substitute.scm", "", extensions); err != nil {
			return err
		}
		variable = "GUIX_EXTENSIONS_PATH=" + strings.TrimSuffix(extensions+":"+d.extensions, ":")
	}
	if err := i.permit(way); err != nil {
		return err
	}
	if !i.systemd() {
		i.note("no systemd is here: start guix-daemon with %s in its environment", variable)
		return nil
	}
	text, err := etc.File("systemd/guix-daemon.service.d/guix-substitute-eris.conf")
	if err != nil {
		return err
	}
	text = bytes.ReplaceAll(text, []byte("GUIX_EXTENSIONS_PATH="+extensions), []byte(variable))
	if user := cmp.Or(d.user, "root"); i.o.Store && (user != "root" || i.exists(socketDropIn)) {
		// The daemon's helpers may connect to the block store. They are no members of its group,
		// for then builds would be, in user namespaces that do not have it, where no file can be
		// given to it, as tests of packages do (Guix, nix/libstore/build.cc: startBuilder).
		if err := i.put(Step{Path: socketDropIn, Text: []byte("[Socket]\nSocketUser=" + user + "\n"), Mode: 0o644}); err != nil {
			return err
		}
	}
	if d.unit == "" {
		i.note("no guix-daemon.service is here; when there is one, it will use this program")
	}
	return i.put(Step{Path: dropIn, Text: text, Mode: 0o644})
}

// ownRules are those of this program in the file of the site, of whatever version.
const ownRules = `(?s)# SPDX-License-Identifier: GPL-3\.0-or-later\n#\n# For way B under AppArmor.*?\n}\n`

// permit has AppArmor let the daemon run the program. The profile of Guix 1.5 permits no programs
// but those of Guix, includes a file of the site for the daemon itself, but none for its helpers,
// which may run programs of the store (Guix, etc/apparmor.d/guix-daemon).
func (i *installation) permit(way string) error {
	const profile, local = "/etc/apparmor.d/guix-daemon", "/etc/apparmor.d/local/guix-daemon"
	if !i.exists(profile) {
		return nil
	}
	if way == "extension" {
		if !strings.HasPrefix(i.program, "/gnu/store/") {
			i.note("AppArmor lets an extension of Guix run programs of the store only: build the package of this program by Guix, and run the setup of that; until then Guix's own helper does the work")
		}
		return nil
	}
	rules, err := i.text("apparmor.d/guix-substitute-eris")
	if err != nil {
		return err
	}
	now, err := i.read(local)
	if err != nil && !errors.Is(err, fs.ErrNotExist) || bytes.Contains(now, rules) {
		return err
	}
	// There must not be two profiles of one name.
	now = regexp.MustCompile(ownRules).ReplaceAll(now, nil)
	// What is kept compiled counts as new by its time, which a clock that was set back makes wrong.
	load := []string{apparmorParser, "--replace", "--skip-read-cache", profile}
	loaded := i.live && i.profileLoaded()
	if loaded {
		i.steps = append(i.steps, Step{Undo: load})
	}
	err = i.put(Step{Path: local, Text: append(now, rules...), Mode: 0o644})
	if loaded {
		i.steps = append(i.steps, Step{Command: load})
	}
	return err
}

// profileLoaded reports whether the profile of guix-daemon is in force. It may be there and not be:
// AppArmor before version 4 does not understand it, and not every kernel has AppArmor.
func (s *System) profileLoaded() bool {
	text, _ := files.ReadRegular(filepath.Join(s.root, "sys/kernel/security/apparmor/profiles"), maxFile)
	return regexp.MustCompile(`(?m)^guix-daemon \(`).Match(text)
}

// finish has a running systemd do what the files say, and start what does not run. When that is
// undone, in the reverse order, files are restored before the daemon starts without them.
func (i *installation) finish() error {
	idle := func(unit string) bool { return exec.Command("systemctl", "is-active", "--quiet", unit).Run() != nil }
	if !i.live || len(i.steps) == 0 && !slices.ContainsFunc(i.started, idle) {
		return nil
	}
	restart := []string{"systemctl", "try-restart", "guix-daemon.service"}
	reload := []string{"systemctl", "daemon-reload"}
	i.steps = append([]Step{{Undo: restart}, {Undo: reload}}, i.steps...)
	// The daemon first, which needs none of the units: one that does not start ends it.
	i.steps = append(i.steps, Step{Command: reload}, Step{Command: restart})
	if len(i.started) > 0 {
		// A service that runs gets no further socket. Clients of the socket for the network have
		// the other one started, too; not the other way round, so that it is the last.
		slices.Sort(i.started)
		i.steps = append(i.steps, Step{Command: []string{"systemctl", "stop", "guix-substitute-eris.socket"}},
			Step{Command: append([]string{"systemctl", "start"}, i.started...), Undo: append([]string{"systemctl", "stop", "guix-substitute-eris.service"}, i.started...)})
	}
	return nil
}
