// SPDX-License-Identifier: GPL-3.0-or-later

package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
)

var must = testhelp.Must

// machine makes a tree with a service of guix-daemon, whose service manager is taken to run: what
// it is told to do goes to the file "calls". The command fails names, fails.
func machine(t *testing.T, fails string) *System {
	t.Helper()
	root, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	bin := t.TempDir()
	for _, name := range []string{"systemctl", "systemd-sysusers", "userdel", "journalctl"} {
		script := fmt.Sprintf("#!/bin/sh\necho %s \"$@\" >>%s/calls\ntest \"%s $*\" != '%s'\n", name, bin, name, fails)
		must(t, os.WriteFile(filepath.Join(bin, name), []byte(script), 0o755))
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	for name, text := range map[string]string{
		"etc/systemd/system/guix-daemon.service": "[Service]\nExecStart=/usr/bin/guix-daemon\nUser=guix-daemon\n",
		"etc/guix/acl":                           "(acl)",
		"opt/program":                            "program",
		"usr/local/bin/guix-substitute-eris":     "an old one",
		"var/lib/x":                              "",
	} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(root, name), []byte(text), 0o640))
	}
	return &System{root: root, live: true}
}

func calls(t *testing.T) []string {
	text, err := os.ReadFile(filepath.Join(strings.Split(os.Getenv("PATH"), ":")[0], "calls"))
	must(t, err)
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// snapshot tells all files with their modes and contents.
func snapshot(t *testing.T, s *System) (lines []string) {
	must(t, filepath.WalkDir(s.root, func(name string, d fs.DirEntry, err error) error {
		info, err2 := os.Lstat(name)
		must(t, err2)
		now, err2 := state(name)
		must(t, err2)
		lines = append(lines, fmt.Sprint(name, info.Mode(), now))
		return err
	}))
	return lines
}

// undone undoes everything as it was announced, after which all must be as before, but for a key
// pair, which others may trust.
func undone(t *testing.T, s *System, before []string) (keys bool) {
	t.Helper()
	said := ""
	say := func(format string, a ...any) { said += fmt.Sprintf(format+"\n", a...) }
	_, err := s.Undo(true, say)
	must(t, err)
	announced := strings.ReplaceAll(said, "would ", "")
	said = ""
	undone, err := s.Undo(false, say)
	must(t, err)
	if said != announced {
		t.Errorf("announced was\n%s and done\n%s", announced, said)
	}
	err = errors.Join(os.Remove(filepath.Join(s.root, "etc/guix/signing-key.sec")), os.Remove(filepath.Join(s.root, publicKeyFile)))
	if after := snapshot(t, s); !undone || !slices.Equal(before, after) {
		t.Errorf("all undone: %v; before:\n%s\nafter:\n%s", undone, strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
	return err == nil
}

func install(t *testing.T, s *System) []Step {
	t.Helper()
	steps, _, err := s.Install(Options{Program: filepath.Join(s.root, "opt/program"), Store: true, Share: true})
	must(t, err)
	return steps
}

// TestLive looks at what the service manager is told, and in which order.
func TestLive(t *testing.T) {
	if _, err := user.Lookup(account); err == nil {
		t.Skip("this machine has such a user")
	}
	s := machine(t, "")
	before := snapshot(t, s)
	must(t, s.Do(install(t, s), t.Logf))
	for _, step := range install(t, s) {
		if step.Path != "" {
			t.Errorf("it is done already: %v", step)
		}
	}
	again, err := s.Use("http://a", nil, nil)
	must(t, err)
	must(t, s.Do(again, t.Logf))
	if !undone(t, s, before) {
		t.Error("the key pair is gone")
	}
	got := calls(t)
	want := []string{
		"systemd-sysusers /etc/sysusers.d/guix-substitute-eris.conf",
		"systemctl daemon-reload",
		"systemctl try-restart guix-daemon.service",
		"systemctl stop guix-substitute-eris.socket",
		"systemctl start guix-substitute-eris-network.socket guix-substitute-eris-publish.service guix-substitute-eris.socket",

		"systemctl stop guix-substitute-eris.service guix-substitute-eris-network.socket guix-substitute-eris-publish.service guix-substitute-eris.socket",
		"userdel guix-substitute-eris",
		"systemctl daemon-reload",
		"systemctl try-restart guix-daemon.service",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the service manager was told\n%s", strings.Join(got, "\n"))
	}
}

// TestAppArmor looks at when the profile of guix-daemon is loaded again: not where it is not in
// force, which would fail. Rules for another place, or of another version, are replaced.
func TestAppArmor(t *testing.T) {
	const profile, loaded = "etc/apparmor.d/guix-daemon", "sys/kernel/security/apparmor/profiles"
	s := machine(t, "")
	const local, store = "etc/apparmor.d/local/guix-daemon", "/gnu/store/aaaa-guix-substitute-eris/bin/guix-substitute-eris"
	for _, name := range []string{local, loaded} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(s.root, name)), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(s.root, profile), nil, 0o644))
	must(t, os.WriteFile(filepath.Join(s.root, local), []byte("# ours\n"), 0o644))
	permit := func(program, profiles string) (loads int) {
		must(t, os.WriteFile(filepath.Join(s.root, loaded), []byte(profiles), 0o644))
		i := &installation{System: s, program: program}
		must(t, i.permit("program"))
		for _, step := range i.steps {
			if len(step.Command) > 0 {
				loads++
			} else if step.Path != "" {
				must(t, os.WriteFile(filepath.Join(s.root, local), step.Text, 0o644))
			}
		}
		return loads
	}
	if permit(Program, "man (enforce)\nnot-guix-daemon (enforce)\n") != 0 {
		t.Error("a profile is loaded that is not in force")
	}
	if permit(store, "man (enforce)\nguix-daemon (enforce)\n") != 1 {
		t.Error("the profile is not loaded again")
	}
	record := record{Undo: []string{apparmorParser, "--replace", profile}}
	if what, _, err := s.undo(record); err != nil || what == "" {
		t.Errorf("a profile that is in force is not loaded again without the rules: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(s.root, loaded), nil, 0o644))
	if what, act, err := s.undo(record); err != nil || what != "" || act != nil {
		t.Errorf("a profile that is in force no longer is loaded: %s %v", what, err)
	}
	text, err := os.ReadFile(filepath.Join(s.root, local))
	must(t, err)
	rules := string(text)
	if !strings.HasPrefix(rules, "# ours\n") || strings.Count(rules, "\nprofile ") != 1 || !strings.Contains(rules, "\n"+store+" cx ") {
		t.Errorf("the rules are now\n%s", rules)
	}
}

// TestInterrupted has each step fail once, or the process end before it or in the middle of it: all
// can be undone.
func TestInterrupted(t *testing.T) {
	for n := range 16 {
		s := machine(t, "")
		before := snapshot(t, s)
		steps, err := install(t, s), error(nil)
		if n >= len(steps) {
			t.Fatalf("there are only %d steps", len(steps))
		}
		must(t, s.Do(steps[:n], t.Logf))
		if step := steps[n]; step.Path != "" {
			// The record is there, and the file only in part.
			must(t, s.open())
			must(t, s.makeParents(step.Path))
			r := record{Path: step.Path}
			if !step.Keep {
				r.After = stateOf(step.Text, step.Link)
			}
			if s.exists(step.Path) {
				r.Copy, err = s.keep(step.Path)
				must(t, err)
			}
			must(t, s.add(r))
			must(t, os.WriteFile(unfinished(filepath.Join(s.root, step.Path)), nil, 0o600))
			s.lock.Close()
		}
		undone(t, s, before)
	}
}

// TestUndoInterrupted has the process end when a file is restored, before that is written down.
func TestUndoInterrupted(t *testing.T) {
	s := machine(t, "")
	before := snapshot(t, s)
	must(t, s.Do([]Step{{Path: aclFile, Text: []byte("(acl ())")}}, t.Logf))
	must(t, os.Rename(filepath.Join(s.root, s.records[0].Copy), filepath.Join(s.root, aclFile)))
	undone(t, s, before)
}

// TestFailure has units not start. What the service has said is the reason, if it has said any, and
// the next time they are started, with nothing else to do; when they run, nothing is.
func TestFailure(t *testing.T) {
	const start = "systemctl start guix-substitute-eris.socket"
	for said, want := range map[string]string{
		"": "cannot run " + start + ": exit status 1",
		"serving\nguix-substitute-eris: error: :5683: another program listens there\nstopping": "cannot run " + start + ": :5683: another program listens there",
	} {
		s := machine(t, start)
		before := snapshot(t, s)
		bin := strings.Split(os.Getenv("PATH"), ":")[0]
		must(t, os.WriteFile(filepath.Join(bin, "journalctl"), fmt.Appendf(nil, "#!/bin/sh\nprintf '%%s' '%s'\n", said), 0o755))
		o := Options{Program: filepath.Join(s.root, "opt/program"), Store: true}
		steps, _, err := s.Install(o)
		must(t, err)
		if err := s.Do(steps, t.Logf); err == nil || err.Error() != want && !strings.HasPrefix(err.Error(), want+": ") {
			t.Errorf("%v", err)
		}
		told := calls(t)
		if !slices.Contains(told, "systemctl try-restart guix-daemon.service") {
			t.Error("the daemon does not use the program")
		}
		i := &installation{System: s, o: o, started: []string{"guix-substitute-eris.socket"}}
		must(t, i.finish())
		if len(i.steps) != 0 {
			t.Errorf("it runs, and there is to do: %v", i.steps)
		}
		must(t, os.WriteFile(filepath.Join(bin, "systemctl"), []byte("#!/bin/sh\ntest \"$1\" != is-active\n"), 0o755))
		must(t, i.finish())
		if !slices.ContainsFunc(i.steps, func(step Step) bool { return strings.Join(step.Command, " ") == start }) {
			t.Errorf("it does not run, and is not started: %v", i.steps)
		}
		undone(t, s, before)
	}
}

// TestLinkStays has the place of a link taken by one that cannot be made: what was there stays.
func TestLinkStays(t *testing.T) {
	s := machine(t, "")
	const path = "/etc/systemd/system/x.wants"
	must(t, s.Do([]Step{{Path: path, Link: "old"}}, t.Logf))
	if err := s.Do([]Step{{Path: path, Link: strings.Repeat("x", 5000)}}, t.Logf); err == nil {
		t.Error("a link of 5000 bytes was made")
	}
	if target, err := os.Readlink(filepath.Join(s.root, path)); target != "old" {
		t.Errorf("the link leads to %.10q, %v", target, err)
	}
	must(t, s.Do([]Step{{Path: path, Link: "new"}}, t.Logf))
	if target, err := os.Readlink(filepath.Join(s.root, path)); target != "new" {
		t.Errorf("the link leads to %.10q, %v", target, err)
	}
}

// TestLostKey has a public key without its private one, which others may trust.
func TestLostKey(t *testing.T) {
	s := machine(t, "")
	must(t, os.WriteFile(filepath.Join(s.root, publicKeyFile), []byte("precious"), 0o644))
	_, _, err := s.Install(Options{Program: filepath.Join(s.root, "opt/program"), Store: true, Share: true})
	if err == nil || !strings.Contains(err.Error(), publicKeyFile+" is there without signing-key.sec") {
		t.Errorf("%v", err)
	}
}

// TestChangedMeanwhile has files changed between what is planned and what is done, while a question
// is open perhaps: nothing that somebody else has written is lost.
func TestChangedMeanwhile(t *testing.T) {
	key := acl.GenerateSigningKey().PublicKey()
	for _, changed := range []string{aclFile, configurationFile, "/etc/guix/signing-key.sec"} {
		s := machine(t, "")
		name := filepath.Join(s.root, changed)
		used, err := s.Use("http://a.example", nil, key)
		must(t, err)
		installed, _, err := s.Install(Options{Program: filepath.Join(s.root, "opt/program"), Store: true, Share: true})
		must(t, err)
		steps := slices.DeleteFunc(append(used, installed...), func(step Step) bool { return step.Path != changed })
		must(t, os.WriteFile(name, []byte("another's"), 0o600))
		if err := s.Do(steps[:1], t.Logf); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
			t.Errorf("%s: %v", changed, err)
		}
		if text, err := os.ReadFile(name); string(text) != "another's" {
			t.Errorf("%s has %q, %v", changed, text, err)
		}
	}
}

// TestStrangers has the tree of somebody else, with a record that was not made by this program:
// nothing outside of the tree is changed, and no program is run.
func TestStrangers(t *testing.T) {
	s := machine(t, "")
	s.live = false
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("x"), 0o600))
	up := strings.Repeat("/..", strings.Count(s.root, "/"))
	must(t, s.open())
	must(t, s.save([]record{
		{Undo: []string{"rm", outside}},
		{Path: "/a", After: stateOf([]byte("a"), ""), Copy: up + outside},
		{Path: up + outside, After: stateOf([]byte("x"), "")},
	}))
	s.lock.Close()
	must(t, os.WriteFile(filepath.Join(s.root, "a"), []byte("a"), 0o600))
	if undone, err := s.Undo(false, t.Logf); undone || err != nil {
		t.Error(undone, err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}

	// The record itself leads elsewhere, and nobody writes to the files of the service.
	must(t, os.RemoveAll(s.directory))
	must(t, os.Symlink(filepath.Dir(outside), s.directory))
	if _, err := s.Undo(false, t.Logf); err == nil {
		t.Error("a record outside of the tree was taken")
	}
	for _, name := range []string{"etc/os-release", "etc/systemd/system/guix-daemon.service", "usr/bin/guix-daemon"} {
		name = filepath.Join(s.root, name)
		must(t, os.RemoveAll(name))
		must(t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(t, unix.Mkfifo(name, 0o600))
	}
	if s.GuixSystem() || (&installation{System: s}).daemon().program || (&installation{System: s}).isProgram("/usr/bin/guix-daemon") {
		t.Error("pipes say something")
	}
}

// TestReadService reads services with settings that say nothing, or go on in the next line.
func TestReadService(t *testing.T) {
	s := machine(t, "")
	read := func(text string) daemon {
		must(t, os.WriteFile(filepath.Join(s.root, "etc/systemd/system/guix-daemon.service"), []byte("[Service]\n"+text), 0o644))
		return (&installation{System: s}).daemon()
	}
	if d := read("ExecStart=\nUser=\nEnvironment=GUIX_EXTENSIONS_PATH=\nEnvironment=\n"); d.extensions != "" || d.program {
		t.Errorf("%+v", d)
	}
	d := read("# \\\nExecStart=\\\n  # between \\\n /usr/bin/guix-daemon \\\n --discover\nEnvironment=A=b \\\n GUIX_EXTENSIONS_PATH=/x\n")
	said, _ := ReadService(s.root, "etc/systemd/system/guix-daemon.service", "")
	if fields := strings.Fields(said["ExecStart"]); len(fields) != 2 || fields[0] != "/usr/bin/guix-daemon" || d.extensions != "/x" {
		t.Errorf("%q %+v", said, d)
	}
	if d := read("Environment=GUIX_EXTENSIONS_PATH=/x\nEnvironment=\n"); d.extensions != "" {
		t.Errorf("%+v", d)
	}
}

func TestAddToList(t *testing.T) {
	for _, c := range []struct{ text, want, fails string }{
		{"", "l = [\"v\"]\n", ""},
		{"a = 1", "a = 1\nl = [\"v\"]\n", ""},
		{"l = []", "l = [\"v\", ]", ""},
		{"# l = [\n l=[ 'w' ] # x\n", "# l = [\n l=[\"v\",  'w' ] # x\n", ""},
		{"l = [\n # c\n \"w\",\n \"v\"\n]\n", "l = [\n # c\n \"w\",\n \"v\"\n]\n", ""},
		{"l = [\"none\"]", "l = [\"none\"]", ""},
		{"l = 1", "", "by hand"},
		{"l = [", "", "expected"},
		{"[t]\na = 1\n", "", "by hand"},
		{"a = '''\nl = [\n'''\nl = []\n", "", "by hand"},
		{"\"l\" = [\"w\"]\n", "", "by hand"},
	} {
		got, err := addToList([]byte(c.text), "l", "v")
		if c.fails != "" {
			if err == nil || !strings.Contains(err.Error(), c.fails) {
				t.Errorf("%q: %q, %v", c.text, got, err)
			}
			continue
		}
		if err != nil || string(got) != c.want {
			t.Errorf("%q: %q, %v", c.text, got, err)
		}
	}
	for _, value := range []string{`a"b`, `a\b`, "a\nb", "a\"]\nx = [\"b"} {
		if got, err := addToList(nil, "l", value); err == nil {
			t.Errorf("%q: %q", value, got)
		}
	}
}

// TestAuthorise adds keys to lists, of which none may get lost.
func TestAuthorise(t *testing.T) {
	s := machine(t, "")
	own, key := acl.GenerateSigningKey().PublicKey(), acl.GenerateSigningKey().PublicKey()
	file := filepath.Join(s.root, aclFile)
	must(t, os.WriteFile(filepath.Join(s.root, publicKeyFile), []byte(own.Text()), 0o644))
	foreign := "(public-key (dsa (p #01#)))"
	for _, c := range []struct {
		list string
		keys int
	}{
		{"(acl)", 1}, {acl.NewACL(own).Text(), 2}, {acl.NewACL(key).Text(), 0}, {"", 2},
		{"(acl (entry " + foreign + " (tag (guix import))))", 2},
		{"(acl (entry " + foreign + " (tag (guix export))))", -1}, {"(acl", -1}, {"nonsense", -1},
	} {
		os.Remove(file)
		if c.list != "" {
			must(t, os.WriteFile(file, []byte(c.list), 0o644))
		}
		step, err := s.authorise(key)
		switch {
		case c.keys < 0 && err == nil:
			t.Errorf("%q: written anew", c.list)
		case c.keys < 0:
		case c.keys == 0 && (step.Path != "" || err != nil || !s.Authorised(key)):
			t.Errorf("%q: %v, %v", c.list, step, err)
		case c.keys > 0:
			got, err2 := acl.ParseACL(step.Text)
			if err != nil || err2 != nil || len(got.Keys()) != c.keys || !got.Contains(key) {
				t.Errorf("%q: %q, %v, %v", c.list, step.Text, err, err2)
			}
		}
	}
}
