// SPDX-License-Identifier: GPL-3.0-or-later

// Package demo shows the whole way on a private store, for people who have nothing but the program.
package demo

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// Command shows the whole way.
func Command() *cobra.Command {
	c := &cobra.Command{
		Use:   "[PATH]...",
		Short: "show the whole way on a private store",
		Long: `Show the whole way on a private store: items are published with read
capabilities by one machine, their blocks go to a block store, and the helpers
of another machine's daemon look the items up. After they have been deleted
there they come back from the blocks; once more, with the block store stopped,
they come back from the nars.

The items are copies of the files or trees at PATH; without any, of a generated
tree. Everything happens in one new directory, which is removed at the end.`,
	}
	keep := c.Flags().Bool("keep", false, "do not remove the directory")
	c.RunE = func(_ *cobra.Command, paths []string) error {
		d := &demo{}
		err := d.run(c.Context(), paths)
		err = errors.Join(err, d.end(*keep))
		if c.Context().Err() != nil {
			return errors.New("interrupted")
		}
		return err
	}
	return c
}

// demo is one demonstration: a machine in a directory.
type demo struct {
	directory     string
	servers       []*server
	store, mirror string // their URLs
	items         []demoItem
}

// demoItem is a store item.
type demoItem struct {
	path string
	hash string // NarHash
	size uint64 // NarSize
}

// maxSocketPath is how long the name of a socket may be (unix(7)).
const maxSocketPath = 107

func (d *demo) run(ctx context.Context, trees []string) (err error) {
	// The children are told to end when the thread ends that has started them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	parent := os.TempDir()
	if len(parent) > maxSocketPath-len("/guix-substitute-eris-demo-4294967295/eris.sock") {
		parent = "/tmp"
	}
	if d.directory, err = os.MkdirTemp(parent, "guix-substitute-eris-demo-"); err != nil {
		return err
	}
	d.say("Everything happens in %s.", d.directory)
	if err := d.makeItems(ctx, trees); err != nil {
		return err
	}
	if err := d.makeConfiguration(); err != nil {
		return err
	}

	d.say("\n1. A block store on a Unix socket, and a publisher that puts blocks there")
	socket := d.file("eris.sock")
	d.store = "coap+unix://" + socket
	store, err := d.start(ctx, "serve", "serving on coap+unix:", "--directory="+d.file("blocks"), "--socket="+socket)
	if err != nil {
		return err
	}
	publisher, err := d.start(ctx, "publish", "publishing on ", "--listen=127.0.0.1:0", "--store-dir="+d.file("store"), "--root="+d.file("publisher"),
		"--public-key="+d.file("etc/signing-key.pub"), "--private-key="+d.file("etc/signing-key.sec"),
		"--manifest="+d.file("manifest"), "--eris="+d.store, "--cache="+d.file("cache"))
	if err != nil {
		return err
	}
	d.mirror = lastAfter(publisher.said(), "publishing on ")
	d.say("   %s\n   %s", d.store, d.mirror)

	d.say("\n2. The narinfo of %s", filepath.Base(d.items[0].path))
	for i, item := range d.items {
		begin := time.Now()
		text, err := d.narinfo(ctx, item.path)
		if err != nil {
			return err
		}
		if i == 0 {
			d.say("%s", indent(text))
		}
		d.say("   %s of nar encoded, blocks stored, narinfo signed in %v", page.Size(int64(item.size)), since(begin))
	}

	d.say("\n3. guix-daemon starts a helper and asks what is available")
	var paths []string
	for _, item := range d.items {
		paths = append(paths, item.path)
	}
	begin := time.Now()
	reply, _, err := d.ask(ctx, "--query", "have "+strings.Join(paths, " ")+" "+d.file("store")+"/00000000000000000000000000000000-absent")
	if err != nil {
		return err
	}
	if want := strings.Join(paths, "\n") + "\n\n"; reply != want {
		return fmt.Errorf("the reply is %q instead of %q", reply, want)
	}
	d.say("   %d of %d, the last of which nobody has, after %v", len(d.items), len(d.items)+1, since(begin))

	d.say("\n4. The items are deleted, and the daemon has other helpers fetch them")
	if err := d.fetchAll(ctx, "urn:eris:"); err != nil {
		return err
	}
	d.say("\n5. The block store is stopped, the items are deleted, and fetched once more")
	if err := store.end(); err != nil {
		return err
	}
	if err := d.fetchAll(ctx, d.mirror); err != nil {
		return err
	}
	if err := publisher.end(); err != nil {
		return err
	}
	d.say("\nAll items have come back both ways, with the hashes that their narinfos say.")
	return nil
}

func (d *demo) say(format string, a ...any) { fmt.Printf(format+"\n", a...) }

func (d *demo) file(name string) string { return filepath.Join(d.directory, name) }

func since(begin time.Time) time.Duration { return time.Since(begin).Round(time.Millisecond) }

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if len(line) > 132 {
			line = line[:129] + "..."
		}
		b.WriteString("   | " + line + "\n")
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func (d *demo) makeItems(ctx context.Context, paths []string) error {
	if err := errors.Join(os.Mkdir(d.file("store"), 0o755), os.Mkdir(d.file("publisher"), 0o755)); err != nil {
		return err
	}
	if len(paths) == 0 {
		paths = []string{d.file("generated-1.0")}
		if err := generate(paths[0]); err != nil {
			return err
		}
	}
	for _, path := range paths {
		if err := d.makeItem(ctx, path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// makeItem puts a copy of what is at a path into the store.
func (d *demo) makeItem(ctx context.Context, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	// What may not be in the name of a store item becomes a hyphen.
	name := regexp.MustCompile(`[^-+._?=0-9A-Za-z]`).ReplaceAllString(filepath.Base(path), "-")
	name = strings.TrimLeft(name, ".")
	name = cmp.Or(name[:min(len(name), 100)], "item")
	hash := sha256.Sum256(fmt.Appendf(nil, "%d %s", len(d.items), name))
	item := demoItem{path: d.file("store/" + nixbase32.EncodeToString(hash[:20]) + "-" + name)}
	if err := narinfo.CheckStorePath(d.file("store"), item.path); err != nil {
		return err
	}
	var r restore.Result
	// The publisher is another machine, with a store of its own.
	for _, to := range []string{d.file("publisher/" + filepath.Base(item.path)), item.path} {
		tree := nar.NewTree(path)
		r, err = restore.Restore(ctx, tree, to, restore.Options{})
		tree.Close()
		if err != nil {
			return err
		}
	}
	item.hash, item.size = "sha256:"+nixbase32.EncodeToString(r.NarHash[:]), r.NarSize
	d.items = append(d.items, item)
	return nil
}

// generate makes a tree with what occurs in store items: many small files, some of them equal, a
// large one, links and programs.
func generate(root string) error {
	random := rand.NewChaCha8([32]byte{})
	write := func(name string, size int, mode fs.FileMode) error {
		b := make([]byte, size)
		random.Read(b)
		return os.WriteFile(name, b, mode)
	}
	for i := range 20 {
		directory := fmt.Sprintf("%s/share/part %d", root, i)
		if err := os.MkdirAll(directory, 0o755); err != nil {
			return err
		}
		for j := range 20 {
			if err := write(fmt.Sprintf("%s/file-%d", directory, j), (i*20+j)*60, 0o644); err != nil {
				return err
			}
		}
		if err := os.WriteFile(directory+"/LICENSE", []byte(strings.Repeat("the same everywhere\n", 500)), 0o644); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(root+"/bin", 0o755); err != nil {
		return err
	}
	return errors.Join(write(root+"/bin/program", 12<<20, 0o755), os.Symlink("program", root+"/bin/alias"))
}

// makeConfiguration makes the key pair, the list of authorised keys, and what the publisher has to
// know of the items: without a daemon there is no database.
func (d *demo) makeConfiguration() error {
	key := acl.GenerateSigningKey()
	var manifest strings.Builder
	for i, item := range d.items {
		references := ""
		if i > 0 {
			references = filepath.Base(d.items[i-1].path)
		}
		fmt.Fprintf(&manifest, "StorePath: %s\nReferences: %s\n\n", item.path, references)
	}
	return errors.Join(
		os.MkdirAll(d.file("etc"), 0o755),
		os.WriteFile(d.file("etc/signing-key.pub"), []byte(key.PublicKey().Text()), 0o644),
		os.WriteFile(d.file("etc/signing-key.sec"), []byte(key.SecretText()), 0o600),
		os.WriteFile(d.file("etc/acl"), []byte(acl.NewACL(key.PublicKey()).Text()), 0o644),
		os.WriteFile(d.file("etc/substitute-eris.toml"), []byte("policy = \"eris-first\"\n"), 0o644),
		os.WriteFile(d.file("manifest"), []byte(manifest.String()), 0o644),
	)
}

// narinfo gets the narinfo of an item once it has a read capability.
func (d *demo) narinfo(ctx context.Context, path string) (string, error) {
	url := d.mirror + "/" + filepath.Base(path)[:32] + ".narinfo"
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return "", err
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return "", err
		}
		text, err := io.ReadAll(io.LimitReader(response.Body, narinfo.MaxSize))
		response.Body.Close()
		if err != nil {
			return "", err
		}
		if response.StatusCode != http.StatusOK {
			return "", fmt.Errorf("%s: %s", url, response.Status)
		}
		if strings.Contains(string(text), "\nERIS: ") {
			return string(text), nil
		}
		// A large item is encoded in the background.
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// fetchAll deletes the items and has helpers fetch them. From is how the URLs of the sources must
// begin.
func (d *demo) fetchAll(ctx context.Context, from string) error {
	for _, item := range d.items {
		if err := restore.Remove(item.path); err != nil {
			return err
		}
	}
	// As the garbage collector does with links of files that nobody has any more.
	if err := restore.Remove(d.file("store/.links")); err != nil {
		return err
	}
	for _, item := range d.items {
		begin := time.Now()
		reply, said, err := d.ask(ctx, "--substitute", "substitute "+item.path+" "+item.path)
		took := since(begin)
		if err != nil {
			return err
		}
		if want := fmt.Sprintf("success %s %d\n", item.hash, item.size); reply != want {
			return fmt.Errorf("the reply is %q instead of %q\n%s", reply, want, said)
		}
		sum, _, err := nar.HashTree(ctx, item.path)
		if err != nil {
			return err
		}
		if got := "sha256:" + nixbase32.EncodeToString(sum[:]); got != item.hash {
			return fmt.Errorf("%s has the hash %s instead of %s", item.path, got, item.hash)
		}
		source := strings.TrimSuffix(lastAfter(said, "Downloading "), "...")
		if !strings.HasPrefix(source, from) {
			return fmt.Errorf("%s has come from %q instead of %s", item.path, source, from)
		}
		rate := float64(item.size) / (1 << 20) / max(took.Seconds(), 0.001)
		d.say("   %s\n     from %s\n     %v, %.0f MiB/s; hash checked: %s", filepath.Base(item.path), source, took, rate, item.hash)
	}
	return nil
}

func (d *demo) end(keep bool) error {
	for _, s := range slices.Backward(d.servers) {
		s.end() // those that should have ended have done so
	}
	if d.directory == "" || keep {
		return nil
	}
	return restore.Remove(d.directory)
}

// command prepares this program to be run with another command, which knows nothing of the user's
// own Guix.
func (d *demo) command(ctx context.Context, args ...string) (*exec.Cmd, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := exec.CommandContext(ctx, program, args...)
	c.Dir = d.directory
	c.Env = []string{
		"PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.Getenv("TMPDIR"), "HOME=" + d.directory, "XDG_RUNTIME_DIR=" + d.directory,
		"GUIX_STATE_DIRECTORY=" + d.file("state"), "GUIX_CONFIGURATION_DIRECTORY=" + d.file("etc"), "NIX_STORE_DIR=" + d.file("store"),
	}
	// However this process ends, the child does not outlive it.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c, nil
}

// ask starts a helper as guix-daemon does, sends it a request, and returns the reply and what else
// the helper says.
func (d *demo) ask(ctx context.Context, mode, request string) (reply, said string, err error) {
	c, err := d.command(ctx, "substitute", mode)
	if err != nil {
		return "", "", err
	}
	replies, w, err := os.Pipe()
	if err != nil {
		return "", "", err
	}
	defer replies.Close()
	var output strings.Builder
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(request+"\n"), &output, &output
	c.ExtraFiles = []*os.File{nil, w} // descriptors 3 and 4
	c.Env = append(c.Env, "_NIX_OPTIONS=discover=false\nsubstitute-urls="+d.mirror+"\n", "ERIS_STORE_URL="+d.store)
	err = c.Start()
	w.Close()
	var text []byte
	if err == nil {
		text, err = io.ReadAll(replies)
		err = errors.Join(err, c.Wait())
	}
	if err != nil {
		err = fmt.Errorf("substitute: %w\n%s", err, output.String())
	}
	return string(text), output.String(), err
}

// lastAfter returns what follows a word in the last line of a text that has it. A line that shows
// progress ends in a carriage return.
func lastAfter(text, word string) string {
	i := strings.LastIndex(text, word)
	if i < 0 {
		return ""
	}
	rest := text[i+len(word):]
	return rest[:max(0, strings.IndexAny(rest, "\r\n"))]
}

// A server is this program, run as one. What it says goes to a file.
type server struct {
	name, log string
	stop      func()
	gone      chan struct{}
	err       error // when gone is closed
}

// start runs a server, and waits until it says that it is ready.
func (d *demo) start(ctx context.Context, name, ready string, args ...string) (*server, error) {
	ctx, stop := context.WithCancel(ctx)
	s := &server{name: name, log: d.file(name + ".log"), stop: stop, gone: make(chan struct{})}
	c, err := d.command(ctx, append(append([]string{name}, args...), fmt.Sprintf("--user=%d", os.Geteuid()))...)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c.Stderr = log
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = 20 * time.Second // until it is killed
	if err := c.Start(); err != nil {
		return nil, err
	}
	d.servers = append(d.servers, s)
	go func() { // ends with the child, which end waits for
		s.err = c.Wait()
		close(s.gone)
	}()
	for begin := time.Now(); lastAfter(s.said(), ready) == ""; {
		select {
		case <-s.gone:
			return nil, s.failure(s.err)
		case <-time.After(time.Millisecond):
		}
		if time.Since(begin) > time.Minute {
			return nil, s.failure(errors.New("it has not started"))
		}
	}
	return s, nil
}

func (s *server) said() string {
	text, _ := os.ReadFile(s.log)
	return string(text)
}

// failure adds what the server has said to an error.
func (s *server) failure(err error) error { return fmt.Errorf("%s: %w\n%s", s.name, err, s.said()) }

func (s *server) end() error {
	s.stop()
	<-s.gone
	if s.err == nil || errors.Is(s.err, context.Canceled) { // as it was told
		return nil
	}
	return s.failure(s.err)
}
