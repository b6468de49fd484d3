// SPDX-License-Identifier: GPL-3.0-or-later

// Package demo shows the whole way on a private store, for people who have nothing but the program.
package demo

import (
	"bufio"
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
	"runtime"
	"strings"
	"sync"
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
		d := &demo{w: os.Stdout}
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
	w         io.Writer
	directory string
	children  []*demoChild
	items     []demoItem
}

// demoItem is a store item.
type demoItem struct {
	path string
	hash string // NarHash
	size uint64 // NarSize
}

// maxSocketPath is how long the name of a socket may be (unix(7)).
const maxSocketPath = 107

func (d *demo) run(ctx context.Context, paths []string) (err error) {
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
	if err := d.makeItems(ctx, paths); err != nil {
		return err
	}
	if err := d.makeConfiguration(); err != nil {
		return err
	}

	d.say("\n1. A block store on a Unix socket, and a publisher that puts blocks there")
	socket := "coap+unix://" + filepath.Join(d.directory, "eris.sock")
	store, err := d.start("serve", "serving on coap+unix:", "--directory="+filepath.Join(d.directory, "blocks"), "--socket="+filepath.Join(d.directory, "eris.sock"))
	if err != nil {
		return err
	}
	publisher, err := d.start("publish", "publishing on ", "--listen=127.0.0.1:0", "--store-dir="+d.file("store"), "--root="+d.file("publisher"),
		"--public-key="+d.file("etc/signing-key.pub"), "--private-key="+d.file("etc/signing-key.sec"),
		"--manifest="+d.file("manifest"), "--eris="+socket, "--cache="+d.file("cache"))
	if err != nil {
		return err
	}
	server := publisher.found("publishing on ")
	d.say("   %s\n   %s", socket, server)

	d.say("\n2. The narinfo of %s", filepath.Base(d.items[0].path))
	for i, item := range d.items {
		begin := time.Now()
		text, err := d.narinfo(ctx, server, item.path)
		if err != nil {
			return err
		}
		if i == 0 {
			d.say("%s", indent(text))
		}
		d.say("   %s of nar encoded, blocks stored, narinfo signed in %v", page.Size(int64(item.size)), since(begin))
	}

	d.say("\n3. guix-daemon starts a helper and asks what is available")
	query, err := d.startHelper(ctx, "--query", server, socket)
	if err != nil {
		return err
	}
	begin := time.Now()
	reply, err := query.ask("have "+d.allPaths()+" "+d.file("store")+"/00000000000000000000000000000000-absent", "")
	if err != nil {
		return err
	}
	if want := strings.ReplaceAll(d.allPaths(), " ", "\n") + "\n\n"; reply != want {
		return fmt.Errorf("the reply is %q instead of %q", reply, want)
	}
	d.say("   %d of %d, after %v", len(d.items), len(d.items)+1, since(begin))
	if err := query.end(); err != nil {
		return err
	}

	helper, err := d.startHelper(ctx, "--substitute", server, socket)
	if err != nil {
		return err
	}
	d.say("\n4. The items are deleted, and the daemon has another helper fetch them")
	if err := d.fetchAll(helper, "urn:eris:"); err != nil {
		return err
	}
	d.say("\n5. The block store is stopped, the items are deleted, and fetched once more")
	if err := store.end(); err != nil {
		return err
	}
	if err := d.fetchAll(helper, server); err != nil {
		return err
	}
	if err := helper.end(); err != nil {
		return err
	}
	if err := publisher.end(); err != nil {
		return err
	}
	d.say("\nAll items have come back both ways, with the hashes that their narinfos say.")
	return nil
}

func (d *demo) say(format string, a ...any) { fmt.Fprintf(d.w, format+"\n", a...) }

// file is a file in the directory.
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

// makeItems fills the store.
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
	name := strings.TrimLeft(strings.Map(func(r rune) rune {
		if strings.ContainsRune("+-._?=", r) || r < 0x80 && ('0' <= r && r <= '9' || 'a' <= r|0x20 && r|0x20 <= 'z') {
			return r
		}
		return '-'
	}, filepath.Base(path)), ".")
	name = name[:min(len(name), 100)]
	if name == "" {
		name = "item"
	}
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
func (d *demo) narinfo(ctx context.Context, server, path string) (string, error) {
	url := server + "/" + filepath.Base(path)[:32] + ".narinfo"
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

func (d *demo) allPaths() string {
	var all []string
	for _, item := range d.items {
		all = append(all, item.path)
	}
	return strings.Join(all, " ")
}

// fetchAll deletes the items and has a helper fetch them. From is how the URLs of the sources must
// begin.
func (d *demo) fetchAll(helper *demoChild, from string) error {
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
		reply, err := helper.ask("substitute "+item.path+" "+item.path, "Downloading "+from)
		took := since(begin)
		if err != nil {
			return err
		}
		if want := fmt.Sprintf("success %s %d\n", item.hash, item.size); reply != want {
			return helper.failure(fmt.Errorf("the reply is %q instead of %q", reply, want))
		}
		sum, _, err := nar.HashTree(context.Background(), item.path)
		if err != nil {
			return err
		}
		if got := "sha256:" + nixbase32.EncodeToString(sum[:]); got != item.hash {
			return fmt.Errorf("%s has the hash %s instead of %s", item.path, got, item.hash)
		}
		source := strings.TrimSuffix(helper.found("Downloading "), "...")
		if !strings.HasPrefix(source, from) {
			return fmt.Errorf("%s has come from %q instead of %s", item.path, source, from)
		}
		rate := float64(item.size) / (1 << 20) / max(took.Seconds(), 0.001)
		d.say("   %s\n     from %s\n     %v, %.0f MiB/s; hash checked: %s", filepath.Base(item.path), source, took, rate, item.hash)
	}
	return nil
}

// end stops the children, and removes the directory.
func (d *demo) end(keep bool) error {
	var all error
	for i := len(d.children) - 1; i >= 0; i-- {
		d.children[i].end() // those that should have ended have done so
	}
	if d.directory != "" && !keep {
		all = restore.Remove(d.directory)
	}
	return all
}

// A demoChild is this program, run with another command. What it says is written to it.
type demoChild struct {
	name    string
	cmd     *exec.Cmd
	stdin   io.WriteCloser // of a helper
	replies *os.File
	reader  *bufio.Reader

	gone chan struct{}
	err  error // when gone is closed

	mu   sync.Mutex
	said string // since the last request, the end of it
}

// maxSaid is how many bytes of what a child says are kept.
const maxSaid = 64 << 10

// environment is that of children: nothing of the user's own Guix.
func (d *demo) environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.Getenv("TMPDIR"), "HOME=" + d.directory, "XDG_RUNTIME_DIR=" + d.directory,
		"GUIX_STATE_DIRECTORY=" + d.file("state"), "GUIX_CONFIGURATION_DIRECTORY=" + d.file("etc"), "NIX_STORE_DIR=" + d.file("store"),
	}
}

// command prepares a child.
func (d *demo) command(name string, args ...string) (*demoChild, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &demoChild{name: name, cmd: exec.Command(program, append([]string{name}, args...)...), gone: make(chan struct{})}
	c.cmd.Dir, c.cmd.Env = d.directory, d.environment()
	c.cmd.Stdout, c.cmd.Stderr = c, c
	// However this process ends, the child does not outlive it.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c, nil
}

// runChild starts a child.
func (d *demo) runChild(c *demoChild) error {
	if err := c.cmd.Start(); err != nil {
		return err
	}
	d.children = append(d.children, c)
	go func() { // ends with the child, which end waits for
		c.err = c.cmd.Wait()
		close(c.gone)
	}()
	return nil
}

// start runs a server, and waits until it says that it is ready.
func (d *demo) start(name, ready string, args ...string) (*demoChild, error) {
	c, err := d.command(name, append(args, fmt.Sprintf("--user=%d", os.Geteuid()))...)
	if err != nil {
		return nil, err
	}
	if err := d.runChild(c); err != nil {
		return nil, err
	}
	if !c.await(ready) {
		return nil, c.failure(errors.New("it has not started"))
	}
	return c, nil
}

// Write takes what the child says.
func (c *demoChild) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.said += string(p)
	c.said = c.said[max(0, len(c.said)-maxSaid):]
	return len(p), nil
}

// startHelper starts a helper as guix-daemon does.
func (d *demo) startHelper(ctx context.Context, mode, server, store string) (*demoChild, error) {
	c, err := d.command("substitute", mode)
	if err != nil {
		return nil, err
	}
	c.cmd.Env = append(c.cmd.Env, "_NIX_OPTIONS=discover=false\nsubstitute-urls="+server+"\n", "ERIS_STORE_URL="+store)
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	replies, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	c.replies, c.reader = replies, bufio.NewReader(replies)
	c.cmd.ExtraFiles = []*os.File{nil, w} // descriptors 3 and 4
	if err := d.runChild(c); err != nil {
		return nil, errors.Join(err, replies.Close())
	}
	// Whoever waits for a reply must not wait for ever.
	context.AfterFunc(ctx, func() { c.cmd.Process.Kill() })
	return c, nil
}

// ask sends a request to a helper and returns the reply: a line, or to a query all lines up to an
// empty one. With a word that messages have, it waits for a message with that word, too, which
// comes by another pipe.
func (c *demoChild) ask(request, word string) (string, error) {
	c.mu.Lock()
	c.said = ""
	c.mu.Unlock()
	if _, err := io.WriteString(c.stdin, request+"\n"); err != nil {
		return "", c.failure(err)
	}
	var reply strings.Builder
	for {
		line, err := c.reader.ReadString('\n')
		reply.WriteString(line)
		if err != nil {
			return "", c.failure(err)
		}
		if line == "\n" || !strings.HasPrefix(request, "have ") {
			break
		}
	}
	if word != "" {
		c.await(word)
	}
	return reply.String(), nil
}

// await waits until a child has said a line with a word. It reports whether it does so within a
// minute, and before it ends.
func (c *demoChild) await(word string) bool {
	for begin := time.Now(); time.Since(begin) < time.Minute; {
		if c.found(word) != "" {
			return true
		}
		select {
		case <-c.gone:
			return c.found(word) != ""
		case <-time.After(time.Millisecond):
		}
	}
	return false
}

// found returns what follows a word in the last line that a child has said with it. A line that
// shows progress ends in a carriage return.
func (c *demoChild) found(word string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := strings.LastIndex(c.said, word)
	if i < 0 {
		return ""
	}
	rest := c.said[i+len(word):]
	return rest[:max(0, strings.IndexAny(rest, "\r\n"))]
}

// failure adds what a child has said to an error.
func (c *demoChild) failure(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Errorf("%s: %w\n%s", c.name, err, c.said)
}

// end ends a child: a helper by the end of its input, a server by a signal. It may be called twice.
func (c *demoChild) end() error {
	if c.stdin != nil {
		c.stdin.Close()
	} else {
		c.cmd.Process.Signal(unix.SIGTERM)
	}
	hung := time.AfterFunc(20*time.Second, func() { c.cmd.Process.Kill() })
	defer hung.Stop()
	<-c.gone
	if c.replies != nil {
		c.replies.Close()
	}
	if c.err != nil {
		return c.failure(c.err)
	}
	return nil
}
