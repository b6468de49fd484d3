// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/blockstore/coapserver"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/confine"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/lan"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/publish"
)

// raceOptions keep a process that was built with the race detector from sleeping for a second when
// it ends.
const raceOptions = "atexit_sleep_ms=20"

func TestMain(m *testing.M) {
	os.Setenv("GORACE", raceOptions)
	if name := filepath.Base(os.Args[0]); name != theProgram && name != "lying-store" {
		// What a shell runs in the background ignores this, and so would what scripts start and end by
		// it.
		if signal.Ignored(os.Interrupt) {
			signal.Notify(make(chan os.Signal, 1), os.Interrupt)
		}
		if len(os.TempDir()) > 25 { // with which names of sockets would be too long
			os.Unsetenv("TMPDIR")
		}
		unix.Umask(0o022) // for others may read some of what they make
		// A proxy need not know the way to us, and where lines are broken is not what is tested.
		for _, name := range []string{"http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "COLUMNS"} {
			os.Unsetenv(name)
		}
	}
	testscript.Main(m, map[string]func(){
		"guix-substitute-eris": func() { os.Exit(run(asAnybody(os.Args[1:]))) },
		"lying-store":          lyingStore,
	})
}

// asAnybody has servers run as root where tests do, unless they say otherwise, or AS_ROOT is set.
func asAnybody(args []string) []string {
	i := slices.IndexFunc(args, func(a string) bool { return !strings.HasPrefix(a, "-") })
	server := i >= 0 && (args[i] == "serve" || args[i] == "publish") && !slices.Contains(args, "--help")
	user := slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, "--user=") || a == "-u" })
	if !server || user || os.Geteuid() != 0 || os.Getenv("AS_ROOT") != "" {
		return args
	}
	return append(slices.Clip(args), "--user=root")
}

// TestScript runs the scripts, which are the documentation of what the program does at its
// boundary. Beside the commands of testscript they have those of scriptCommands, which are
// explained there.
func TestScript(t *testing.T) { runScripts(t, testscript.Params{Dir: scripts}) }

// TestOldKernel runs some of them where calls are missing that Linux has got since 3.15, or where a
// sandbox refuses them; but for statx, without which other programs of the scripts fail.
func TestOldKernel(t *testing.T) {
	calls := []uint32{
		unix.SYS_OPENAT2, unix.SYS_COPY_FILE_RANGE, unix.SYS_MEMFD_CREATE, unix.SYS_CLOSE_RANGE, unix.SYS_PIDFD_OPEN,
		unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_LANDLOCK_CREATE_RULESET, unix.SYS_SECCOMP, unix.SYS_FACCESSAT2, unix.SYS_FCHMODAT2,
		unix.SYS_IO_URING_SETUP, unix.SYS_EPOLL_PWAIT2, unix.SYS_PREADV2, unix.SYS_MEMBARRIER,
	}
	if runtime.GOARCH != "riscv64" { // which has no other call to rename
		calls = append(calls, unix.SYS_RENAMEAT2)
	}
	testhelp.WithoutCalls(t, calls, []unix.Errno{unix.ENOSYS, unix.EPERM}, func(t *testing.T) {
		var files []string
		for _, name := range []string{"deduplication", "encode-decode", "look-ahead", "resume", "stores-files", "two-helpers"} {
			files = append(files, filepath.Join(scripts, name+".txt"))
		}
		runScripts(t, testscript.Params{Files: files})
	})
}

const scripts = "testdata/script"

func runScripts(t *testing.T, p testscript.Params) {
	p.Cmds = scriptCommands
	p.Condition = func(name string) (bool, error) {
		switch name {
		case "root":
			return os.Geteuid() == 0, nil
		case "mount": // in a namespace of one's own
			return exec.Command("unshare", "-mr", "mount", "-t", "tmpfs", "none", "/mnt").Run() == nil, nil
		case "landlock":
			return strings.HasPrefix(confine.InForce(), "files by Landlock"), nil
		}
		return false, fmt.Errorf("unknown condition %q", name)
	}
	p.Setup = func(env *testscript.Env) error {
		// As if the machine had no Guix, and nothing of the user's either.
		for name, value := range map[string]string{
			"GUIX_CONFIGURATION_DIRECTORY":     "$WORK/etc",
			"GUIX_STATE_DIRECTORY":             "$WORK/var",
			"HOME":                             "$WORK/home",
			"XDG_RUNTIME_DIR":                  "$WORK",
			"GUIX_SUBSTITUTE_ERIS_SYSTEM_ROOT": "$WORK",
			"MIRROR":                           "",
		} {
			env.Setenv(name, strings.ReplaceAll(value, "$WORK", env.WorkDir))
		}
		mirror, err := filepath.Abs("../../testdata/guix-mirror")
		if err != nil {
			return err
		}
		env.Setenv("MIRROR", mirror)
		// What has been restored is read-only, which testscript cannot remove.
		env.Defer(func() { makeWritable(env.WorkDir) })
		return os.MkdirAll(filepath.Join(env.WorkDir, "etc"), 0o755)
	}
	testscript.Run(t, p)
}

type scriptFunc = func(ts *testscript.TestScript, neg bool, args []string)

// scriptCommands are the commands of the scripts.
var scriptCommands = map[string]scriptFunc{
	"keygen":     withUsage("NAME", scriptKeygen),
	"acl":        withUsage("FILE [KEY]...", scriptACL),
	"address":    withUsage("VARIABLE...", scriptAddress),
	"publish":    withUsage("VARIABLE [OPTION]...", scriptPublish),
	"fetch":      scriptFetch,
	"sign":       withUsage("KEY FILE", scriptSign),
	"nar":        withUsage("PATH FILE", scriptNar),
	"narhash":    withUsage("PATH VARIABLE [SIZE]", scriptNarHash),
	"serve":      withUsage("VARIABLE DIRECTORY [RULE]...", scriptServe),
	"proxy":      withUsage("VARIABLE URL", scriptProxy),
	"requests":   withUsage("VARIABLE FILE", scriptRequests),
	"daemon":     withUsage("query|substitute FILE [OPTION=VALUE]...", scriptDaemon),
	"expand":     scriptExpand,
	"replace":    withUsage("FILE OLD NEW", scriptReplace),
	"stat":       withUsage("FILE MODE", scriptStat),
	"document":   withUsage("FILE [MARK SCRIPT]", scriptDocument),
	"measured":   withUsage("FILE URL BYTES DURATION", scriptMeasured),
	"transcript": withUsage("FILE", scriptTranscript),
	"database":   withUsage("DIRECTORY MANIFEST", scriptDatabase),
}

// withUsage checks the number of arguments of a command. An optional one stands last.
func withUsage(usage string, run scriptFunc) scriptFunc {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		required, _, optional := strings.Cut(usage, "[")
		if n := len(strings.Fields(required)); len(args) < n || len(args) > n && !optional {
			ts.Fatalf("arguments are %q; usage: %s", args, usage)
		}
		run(ts, neg, args)
	}
}

// keygen NAME makes a key pair NAME.pub and NAME.sec.
func scriptKeygen(ts *testscript.TestScript, neg bool, args []string) {
	key := acl.GenerateSigningKey()
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".pub"), []byte(key.PublicKey().Text()), 0o644))
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".sec"), []byte(key.SecretText()), 0o600))
}

// acl FILE [KEY]... writes an access control list with the given keys.
func scriptACL(ts *testscript.TestScript, neg bool, args []string) {
	var keys []*acl.PublicKey
	for _, name := range args[1:] {
		key, err := acl.ParsePublicKey([]byte(ts.ReadFile(name + ".pub")))
		ts.Check(err)
		keys = append(keys, key)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(acl.NewACL(keys...).Text()), 0o644))
}

// sign KEY FILE completes the line "Signature:" of a narinfo with a signature of everything above
// it.
func scriptSign(ts *testscript.TestScript, neg bool, args []string) {
	key, err := acl.ParseSigningKey([]byte(ts.ReadFile(args[0]+".sec")), nil)
	ts.Check(err)
	text := ts.ReadFile(args[1])
	above, below, ok := strings.Cut(text, "Signature:\n")
	if !ok {
		ts.Fatalf("%s has no line \"Signature:\"", args[1])
	}
	field, err := key.Sign(sha256.Sum256([]byte(above)), "example.org")
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(above+"Signature: "+field+"\n"+below), 0o644))
}

// nar PATH FILE makes a nar of a file tree. The names of the tree are those of the file system.
func scriptNar(ts *testscript.TestScript, neg bool, args []string) {
	var b bytes.Buffer
	_, err := nar.Write(&b, nar.NewTree(ts.MkAbs(args[0])))
	ts.Check(err)
	ts.Check(os.MkdirAll(filepath.Dir(ts.MkAbs(args[1])), 0o755))
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b.Bytes(), 0o644))
}

// narhash PATH VARIABLE [SIZE] sets a variable to the NarHash of a file tree, and one to its
// NarSize.
func scriptNarHash(ts *testscript.TestScript, neg bool, args []string) {
	sum, size, err := nar.HashTree(context.Background(), ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Setenv(args[1], hashText(sum))
	if len(args) > 2 {
		ts.Setenv(args[2], fmt.Sprint(size))
	}
}

// database DIRECTORY MANIFEST makes the database of a daemon whose store has the items of a
// manifest, which are in a directory.
func scriptDatabase(ts *testscript.TestScript, neg bool, args []string) {
	manifest, err := publish.ParseManifest([]byte(ts.ReadFile(args[1])))
	ts.Check(err)
	db, err := newDatabase(ts.MkAbs("var/db/db.sqlite"))
	ts.Check(err)
	defer db.Close()
	execute := func(query string, values ...any) {
		_, err := db.Exec(query, values...)
		ts.Check(err)
	}
	for _, item := range manifest {
		sum, size, err := nar.HashTree(context.Background(), filepath.Join(ts.MkAbs(args[0]), filepath.Base(item.StorePath)))
		ts.Check(err)
		execute(insertItem, item.StorePath, fmt.Sprintf("sha256:%x", sum), size)
	}
	for _, item := range manifest {
		for _, reference := range item.References {
			execute("INSERT INTO Refs SELECT a.id, b.id FROM ValidPaths a, ValidPaths b WHERE a.path = ? AND b.path = ?",
				item.StorePath, filepath.Join(filepath.Dir(item.StorePath), reference))
		}
	}
}

// newDatabase makes a database as that of the daemon.
func newDatabase(name string) (*sql.DB, error) {
	db, err := sql.Open("sqlite", name)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(name), 0o755)
	}
	if err == nil {
		_, err = db.Exec("CREATE TABLE ValidPaths (id integer primary key, path text unique, hash text, deriver text, narSize integer);" +
			"CREATE TABLE Refs (referrer integer, reference integer)")
	}
	return db, err
}

const insertItem = "INSERT INTO ValidPaths (path, hash, narSize) VALUES (?, ?, ?)"

// expand FILE... replaces $NAME in files by the value of the variable.
func scriptExpand(ts *testscript.TestScript, neg bool, args []string) {
	for _, name := range args {
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(os.Expand(ts.ReadFile(name), ts.Getenv)), 0o644))
	}
}

// replace FILE OLD NEW replaces a string in a file, which must have it.
func scriptReplace(ts *testscript.TestScript, neg bool, args []string) {
	text := ts.ReadFile(args[0])
	if !strings.Contains(text, args[1]) {
		ts.Fatalf("%s does not contain %q", args[0], args[1])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.ReplaceAll(text, args[1], args[2])), 0o644))
}

// stat FILE MODE checks that a file of a store has an octal mode and the modification time of store
// files.
func scriptStat(ts *testscript.TestScript, neg bool, args []string) {
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[1] {
		ts.Fatalf("%s has mode %s", args[0], got)
	}
	if !info.ModTime().Equal(time.Unix(1, 0)) {
		ts.Fatalf("%s has the modification time %v", args[0], info.ModTime())
	}
}

// A scriptServer is a web server of a script.
type scriptServer struct {
	work   string // the directory of the script
	mu     sync.Mutex
	seen   []string
	active int // requests that will be seen when they have been answered
	busy   atomic.Int64
}

// serve VARIABLE DIRECTORY [RULE]... serves the files of a directory over HTTP until the end of the
// script, and sets the variable to its URL. Rules:
//
//	delay=DURATION  each answer takes that long
//	busy=N          more than N requests at a time are answered with HTTP status 429
//	silent          requests are taken and never answered
//	with=VARIABLE   each answer waits until that server has been asked as well
//	refuse          the URL is one where nobody listens
//	cut=PATH:N      the connection is cut after N bytes of this path
//	stall=PATH:N    after N bytes of this path nothing more comes
//	parts=PATH:N    the connection is cut after N bytes of this path, but answers
//	                have an entity tag, and ranges can be asked for
//	flip=PATH:N     in the first answer for this path, byte N is another one
//	status=PATH:N   this path is answered with HTTP status N
//	once=PATH:N     the first answer for this path is HTTP status N
//	redirect=PATH:URL
//	header=NAME:VALUE  is added to all answers
//	nolength        answers have no Content-Length
//	ranges          parts of files can be asked for
func scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	if slices.Contains(args[2:], "refuse") {
		ts.Setenv(args[0], "http://"+testhelp.FreeAddress())
		return
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv(args[0], "http://"+l.Addr().String())
	server := &scriptServer{work: ts.Getenv("WORK")}
	root, err := os.OpenRoot(ts.MkAbs(args[1]))
	ts.Check(err)
	done := make(chan struct{})
	h := &http.Server{Handler: server.handler(root, args[2:], done)}
	var wait sync.WaitGroup
	wait.Go(func() { h.Serve(l) })
	ts.Defer(func() {
		close(done)
		h.Close()
		wait.Wait()
		root.Close()
	})
	servers.Store(ts.Getenv("WORK")+"/"+args[0], server)
}

// address VARIABLE... sets variables to addresses of this machine where nobody listens.
func scriptAddress(ts *testscript.TestScript, neg bool, args []string) {
	for _, name := range args {
		ts.Setenv(name, testhelp.FreeAddress())
	}
}

// proxy VARIABLE URL serves what another server has, and sets the variable to its URL. In what
// "requests" writes, the length of each answer follows its path.
func scriptProxy(ts *testscript.TestScript, neg bool, args []string) {
	there, err := url.Parse(args[1])
	ts.Check(err)
	server := &scriptServer{}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		server.mu.Lock()
		server.active++
		server.mu.Unlock()
		defer func() {
			server.mu.Lock()
			server.active--
			server.mu.Unlock()
		}()
		counted := &countedAnswer{ResponseWriter: w}
		httputil.NewSingleHostReverseProxy(there).ServeHTTP(counted, r)
		server.mu.Lock()
		defer server.mu.Unlock()
		server.seen = append(server.seen, fmt.Sprintf("%s %s %d", r.Method, r.URL.Path, counted.n))
	}))
	ts.Defer(proxy.Close)
	ts.Setenv(args[0], proxy.URL)
	servers.Store(ts.Getenv("WORK")+"/"+args[0], server)
}

type countedAnswer struct {
	http.ResponseWriter
	n int
}

func (c *countedAnswer) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n += n
	return n, err
}

// servers has the servers of all scripts, which run in parallel.
var servers sync.Map

func (s *scriptServer) handler(root *os.Root, rules []string, done chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.seen = append(s.seen, r.Method+" "+r.RequestURI)
		s.mu.Unlock()
		silent := func() {
			select {
			case <-r.Context().Done():
			case <-done:
			}
		}
		length, ranges, flip := true, false, -1
		for _, rule := range rules {
			name, value, _ := strings.Cut(rule, "=")
			path, argument, _ := strings.Cut(value, ":")
			number, _ := strconv.Atoi(argument)
			switch name {
			case "busy":
				most, _ := strconv.ParseInt(value, 10, 64)
				defer s.busy.Add(-1)
				if s.busy.Add(1) > most {
					w.WriteHeader(http.StatusTooManyRequests)
					return
				}
			case "delay":
				d, _ := time.ParseDuration(value)
				select {
				case <-time.After(d):
				case <-done:
				}
			case "silent":
				silent()
				return
			case "with":
				for asked := false; !asked && r.Context().Err() == nil; time.Sleep(time.Millisecond) {
					if other, ok := servers.Load(s.work + "/" + value); ok {
						other := other.(*scriptServer)
						other.mu.Lock()
						asked = len(other.seen) > 0
						other.mu.Unlock()
					}
				}
			case "header":
				w.Header().Set(path, argument)
			case "nolength":
				length = false
			case "ranges":
				ranges = true
			}
			if path != r.URL.Path {
				continue
			}
			switch name {
			case "cut":
				w = &cutAnswer{w, number, func() {}}
			case "parts":
				w = &cutAnswer{w, number, func() {}}
				w.Header().Set("ETag", `"`+r.URL.Path+`"`)
				ranges = true
			case "stall":
				w = &cutAnswer{w, number, silent}
			case "flip":
				if s.count("GET "+path) == 1 {
					flip = number
				}
			case "once":
				if s.count("GET "+path) == 1 {
					w.WriteHeader(number)
					return
				}
			case "status":
				w.WriteHeader(number)
				return
			case "redirect":
				http.Redirect(w, r, argument, http.StatusFound)
				return
			}
		}
		contents, err := root.ReadFile(strings.TrimPrefix(r.URL.Path, "/"))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		if flip >= 0 {
			contents[flip] ^= 1
		}
		if ranges {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(contents))
			return
		}
		if length {
			w.Header().Set("Content-Length", strconv.Itoa(len(contents)))
		}
		w.Write(contents)
	}
}

// count returns how often something has been asked for.
func (s *scriptServer) count(request string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seen := range s.seen {
		if seen == request {
			n++
		}
	}
	return n
}

// cutAnswer is an answer that ends after some bytes.
type cutAnswer struct {
	http.ResponseWriter
	left int
	wait func() // before the connection is cut
}

func (c *cutAnswer) Write(p []byte) (int, error) {
	if len(p) <= c.left {
		c.left -= len(p)
		return c.ResponseWriter.Write(p)
	}
	c.ResponseWriter.Write(p[:c.left])
	http.NewResponseController(c.ResponseWriter).Flush()
	c.wait()
	panic(http.ErrAbortHandler)
}

// requests VARIABLE FILE writes what a server has been asked for, sorted, to a file, and forgets
// it.
func scriptRequests(ts *testscript.TestScript, neg bool, args []string) {
	v, ok := servers.Load(ts.Getenv("WORK") + "/" + args[0])
	if !ok {
		ts.Fatalf("there is no server %s", args[0])
	}
	s := v.(*scriptServer)
	s.mu.Lock()
	for s.active > 0 {
		s.mu.Unlock()
		time.Sleep(time.Millisecond)
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	slices.Sort(s.seen)
	text := strings.Join(s.seen, "\n")
	if text != "" {
		text += "\n"
	}
	s.seen = nil
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(text), 0o644))
}

// daemon query|substitute FILE [OPTION=VALUE]... plays guix-daemon: it starts the program with
// descriptors like the daemon's, sends the request lines of the file, in which $NAME stands for the
// value of a variable, one by one, each after the reply to the one before, and then closes the pipe
// and waits for exit status 0. Replies go to the file "replies" and everything else that the
// program says to "log". The substitute URLs are those in the variable URLS, the daemon's other
// options those given.
//
// With the option kill=PATH the program is killed as soon as PATH exists and is not empty. With
// copies=N there are N of them at once, which must reply alike. With program=FILE another program
// is started. With unread=yes nobody reads the log. With again=TEXT all is done again, twenty times
// at most, while the log has this text: of a source that is late where something stood still.
func scriptDaemon(ts *testscript.TestScript, neg bool, args []string) {
	program, kill, copies, unread, again := theProgram, "", 1, false, ""
	requests := os.Expand(ts.ReadFile(args[1]), ts.Getenv)
	options := "substitute-urls=" + ts.Getenv("URLS") + "\n"
	for _, option := range args[2:] {
		name, value, _ := strings.Cut(option, "=")
		switch name {
		case "kill":
			kill = ts.MkAbs(value)
		case "copies":
			copies, _ = strconv.Atoi(value)
		case "program":
			program = ts.MkAbs(value)
		case "unread":
			unread = true
		case "again":
			again = value
		default:
			options += option + "\n"
		}
	}
	env := append(scriptEnvironment(ts), "_NIX_OPTIONS="+options+"discover=false\n") // no question to the network around us
	results := make([]helperResult, copies)
	repeat(func() bool {
		var wait sync.WaitGroup
		for i := range results {
			wait.Go(func() { results[i] = runHelper(program, args[0], env, requests, kill, unread) })
		}
		wait.Wait()
		return again != "" && strings.Contains(results[0].log, again)
	})
	first := results[0]
	ts.Check(os.WriteFile(ts.MkAbs("replies"), []byte(first.replies), 0o644))
	ts.Check(os.WriteFile(ts.MkAbs("log"), []byte(first.log), 0o644))
	ts.Logf("log:\n%s", first.log)
	for _, r := range results {
		switch {
		case kill == "" && r.err != nil:
			ts.Fatalf("%v; replies so far: %q", r.err, r.replies)
		case kill != "" && r.err == nil:
			ts.Fatalf("the program ended before it was killed; replies: %q", r.replies)
		case r.replies != first.replies:
			ts.Fatalf("replies differ: %q and %q", r.replies, first.replies)
		}
	}
}

// saysLate is what a log says of a store that was late, as where something stood still.
const saysLate = "has not answered"

// repeat calls a function again while it says that a store was late, twenty times in all at most.
// Each time it waits for longer before: the store is left alone for a while, by other processes as
// well.
func repeat(late func() bool) {
	for try := range 20 {
		time.Sleep(time.Duration(try) * 200 * time.Millisecond)
		if !late() {
			return
		}
	}
}

type helperResult struct {
	replies, log string
	err          error
}

// runHelper starts a program as the daemon does, sends requests to it and ends it, or kills it as
// soon as a file is not empty, if it has a name.
func runHelper(program, mode string, env []string, requests, kill string, unread bool) (r helperResult) {
	d, err := startDaemonHelper(program, mode, env, unread)
	if err != nil {
		return helperResult{err: err}
	}
	var killer sync.WaitGroup
	finished := make(chan struct{})
	killer.Go(func() {
		for kill != "" {
			if info, err := os.Stat(kill); err == nil && info.Size() > 0 {
				syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
				return
			}
			select {
			case <-finished:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	r.replies, err = d.talk(requests)
	close(finished)
	killer.Wait()
	r.err = cmp.Or(err, d.close())
	r.log = d.log.String()
	return r
}

// scriptEnvironment is the environment of a script.
func scriptEnvironment(ts *testscript.TestScript) []string {
	var env []string
	for _, name := range []string{
		"PATH", "HOME", "TMPDIR", "TESTSCRIPT_COMMAND", "GOCOVERDIR", "LC_ALL",
		"GORACE", "NIX_STORE_DIR", "GUIX_STATE_DIRECTORY", "GUIX_CONFIGURATION_DIRECTORY", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
		"GUIX_ALLOW_UNAUTHENTICATED_SUBSTITUTES", "GUIX_SUBSTITUTE_DEBUG", "http_proxy", "https_proxy", "no_proxy",
		"GUIX_SUBSTITUTE_ERIS_GUIX", "GUIX_EXTENSIONS_PATH", "ERIS_STORE_URL", "COLUMNS", "GUIX_SUBSTITUTE_ERIS_SYSTEM_ROOT", "SERVER", "URLS", "STORE", "ITEM",
	} {
		if value := ts.Getenv(name); value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// A daemonHelper is the program started as by the daemon.
type daemonHelper struct {
	cmd     *exec.Cmd
	query   bool
	stdin   *os.File
	replies *os.File
	in      *bufio.Reader // the same
	log     bytes.Buffer
	logPipe *os.File
	wait    sync.WaitGroup
	memory  int // the most that it has had at a time when all was replied, in bytes
}

// theProgram is the program, which is in PATH.
const theProgram = "guix-substitute-eris"

func startDaemonHelper(program, mode string, env []string, unread bool) (*daemonHelper, error) {
	d := &daemonHelper{query: mode == "query"}
	stdin, stdinEnd, err := os.Pipe()
	replies, repliesEnd, err2 := os.Pipe()
	log, logEnd, err3 := os.Pipe()
	if err := errors.Join(err, err2, err3); err != nil {
		return nil, err
	}
	d.stdin, d.replies, d.in, d.logPipe = stdinEnd, replies, bufio.NewReader(replies), log
	d.cmd = exec.Command(program, "substitute", "--"+mode)
	d.cmd.Dir = "/"
	d.cmd.Env = append(slices.Clip(env), "GORACE="+raceOptions)
	d.cmd.Stdin, d.cmd.Stdout, d.cmd.Stderr = stdin, logEnd, logEnd
	// Descriptor 3 is something that is none of the program's business.
	d.cmd.ExtraFiles = []*os.File{stdin, repliesEnd}
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	err = d.cmd.Start()
	stdin.Close()
	repliesEnd.Close()
	logEnd.Close()
	if err == nil && !unread {
		d.wait.Go(func() { io.Copy(&d.log, log) })
	}
	return d, err
}

// ask sends a request and returns the whole reply.
func (d *daemonHelper) ask(request string) (string, error) {
	if _, err := io.WriteString(d.stdin, request); err != nil {
		return "", err
	}
	if !strings.HasSuffix(request, "\n") {
		d.stdin.Close() // the last line has no end
	}
	if !d.query {
		// The daemon takes what a single read brings as the reply.
		var b [4096]byte
		n, err := d.replies.Read(b[:])
		if err == nil && (n == 0 || b[n-1] != '\n') {
			err = errors.New("the reply was not written at once")
		}
		return string(b[:n]), err
	}
	var reply strings.Builder
	for {
		line, err := d.in.ReadString('\n')
		reply.WriteString(line)
		if err != nil || line == "\n" && endOfReply(request, reply.String()) {
			return reply.String(), err
		}
	}
}

// talk asks line by line, and returns all replies once there are no more.
func (d *daemonHelper) talk(requests string) (string, error) {
	var all strings.Builder
	for line := range strings.Lines(requests) {
		reply, err := d.ask(line)
		all.WriteString(reply)
		if err != nil {
			return all.String(), fmt.Errorf("no reply to %.100q: %w", line, err)
		}
	}
	var err error
	// What wait(2) tells includes what this process had when it started the other.
	if d.memory, err = mostMemory(d.cmd.Process.Pid); err != nil {
		return all.String(), err
	}
	d.stdin.Close()
	rest, err := io.ReadAll(d.in)
	all.Write(rest)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("more was replied than was asked for: %q", rest)
	}
	return all.String(), err
}

// endOfReply reports whether the empty line that a reply ends with so far is its end rather than an
// unknown deriver.
func endOfReply(request, reply string) bool {
	if !strings.HasPrefix(request, "info") {
		return true
	}
	lines := strings.Split(strings.TrimSuffix(reply, "\n"), "\n")
	for len(lines) > 1 { // path, deriver, count, references, two sizes
		if len(lines) < 3 {
			return false
		}
		count, err := strconv.Atoi(lines[2])
		if err != nil || len(lines) < 5+count {
			return err != nil
		}
		lines = lines[5+count:]
	}
	return len(lines) == 1 && lines[0] == ""
}

// close ends the program.
func (d *daemonHelper) close() error {
	d.stdin.Close()
	err := d.cmd.Wait()
	d.wait.Wait()
	d.replies.Close()
	d.logPipe.Close()
	if err != nil {
		return fmt.Errorf("the program has ended: %w", err)
	}
	return nil
}

// lyingStore is a program for scripts: it serves blocks on the local network, all of them wrong,
// until it is killed.
func lyingStore() {
	zeros := fetch.NewWorkers("liar:", 4, func(_ context.Context, _ eris.Reference, size eris.BlockSize, _ []byte) ([]byte, error) {
		return make([]byte, size), nil
	})
	err := func() error {
		l, err := net.Listen("tcp", ":5683")
		if err != nil {
			return err
		}
		s := coapserver.New(coapserver.Config{Source: zeros})
		go lan.Advertise(context.Background(), lan.Blocks, 5683)
		return s.Serve(l, coapserver.Access{Get: true})
	}()
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
