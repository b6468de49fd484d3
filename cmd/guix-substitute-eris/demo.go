// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/page"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "[PATH]...",
		Short: "show the whole way on a private store",
		Long: `Show the whole way on a private store: items are published with read
capabilities by one machine, their blocks go to a block store, and the helpers
of another machine's daemon look the items up. They come from the blocks; once
they have been deleted there, and the block store is stopped, they come back
from the nars.

The items are copies of the files or trees at PATH; without any, of a generated
tree. Everything happens in one new directory, which is removed at the end.`,
		RunE: func(c *cobra.Command, paths []string) error {
			err := demonstrate(c.Context(), paths)
			if c.Context().Err() != nil {
				return errors.New("interrupted")
			}
			return err
		},
	}
}

// demo is one demonstration: a machine in a directory.
type demo struct {
	page.Teller
	program, directory string
	store, mirror      string // URLs
	items              []demoItem
}

type demoItem struct {
	path string
	hash string // NarHash
	size uint64 // NarSize
}

// maxSocketPath is how long the name of a socket may be (unix(7)).
const maxSocketPath = 107

func demonstrate(ctx context.Context, trees []string) (err error) {
	// The children are told to end when the thread ends that has started them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	program, err := os.Executable()
	if err != nil {
		return err
	}
	parent := os.TempDir()
	if len(parent) > maxSocketPath-len("/guix-substitute-eris-demo-4294967295/eris.sock") {
		parent = "/tmp"
	}
	directory, remove, err := restore.Temporary(parent, "guix-substitute-eris-demo-")
	if err != nil {
		return err
	}
	d := &demo{program: program, directory: directory}
	defer func() { err = errors.Join(err, remove()) }()
	d.Say("Everything happens in %s.\n", directory)
	if err := errors.Join(d.makeItems(ctx, trees), d.makeConfiguration()); err != nil {
		return err
	}
	return cmp.Or(d.show(ctx), d.Err())
}

func (d *demo) show(ctx context.Context) error {
	d.Say("\n1. A block store on a Unix socket, and a publisher that puts blocks there\n")
	d.store = "coap+unix://" + d.file("eris.sock")
	_, stopStore, err := d.start(ctx, "serving on coap+unix:", "serve", "--directory="+d.file("blocks"), "--socket="+d.file("eris.sock"))
	if err != nil {
		return err
	}
	defer stopStore()
	var stopPublisher func()
	d.mirror, stopPublisher, err = d.start(ctx, "publishing on ", "publish", "--listen=127.0.0.1:0", "--store-dir="+d.file("store"), "--root="+d.file("publisher"),
		"--public-key="+d.file("etc/signing-key.pub"), "--private-key="+d.file("etc/signing-key.sec"),
		"--manifest="+d.file("manifest"), "--eris="+d.store, "--cache-bypass-threshold=1TiB", "--cache="+d.file("cache"))
	if err != nil {
		return err
	}
	defer stopPublisher()
	d.Say("   %s\n   %s\n", d.store, d.mirror)

	d.Say("\n2. The narinfo of %s\n", filepath.Base(d.items[0].path))
	for i, item := range d.items {
		begin := time.Now()
		text, err := d.narinfo(ctx, item.path)
		if err != nil {
			return err
		}
		for line := range strings.Lines(text) {
			if i == 0 {
				d.Say("   | %.129s\n", strings.TrimSuffix(line, "\n"))
			}
		}
		d.Say("   %s of nar encoded, blocks stored, narinfo signed in %v\n", page.Size(int64(item.size)), since(begin))
	}

	d.Say("\n3. guix-daemon starts a helper and asks what is available\n")
	if err := d.askAbout(ctx); err != nil {
		return err
	}
	d.Say("\n4. The daemon has other helpers fetch the items\n")
	if err := d.fetchAll(ctx, "urn:eris:"); err != nil {
		return err
	}
	d.Say("\n5. The block store is stopped, the items are deleted, and fetched once more\n")
	stopStore()
	if err := restore.Remove(d.file("store")); err != nil {
		return err
	}
	if err := d.fetchAll(ctx, d.mirror); err != nil {
		return err
	}
	d.Say("\nAll items have come back both ways, with the hashes that their narinfos say.\n")
	return nil
}

func (d *demo) file(name string) string { return filepath.Join(d.directory, name) }

func since(begin time.Time) time.Duration { return time.Since(begin).Round(time.Millisecond) }

func (d *demo) makeItems(ctx context.Context, paths []string) error {
	if err := os.Mkdir(d.file("publisher"), 0o755); err != nil {
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

// makeItem has the publisher, which is another machine, have a copy of what is at a path.
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
	name = nixbase32.EncodeToString(hash[:20]) + "-" + name
	tree := nar.NewTree(path)
	defer tree.Close()
	r, err := restore.Restore(ctx, tree, d.file("publisher/"+name), restore.Options{})
	d.items = append(d.items, demoItem{d.file("store/" + name), hashText(r.NarHash), r.NarSize})
	return err
}

// hashText is a hash as narinfos and replies have it.
func hashText(sum [sha256.Size]byte) string { return "sha256:" + nixbase32.EncodeToString(sum[:]) }

// generate makes a tree with what occurs in store items: many small files, some of them equal, a
// large one, links and programs.
func generate(root string) (err error) {
	random := rand.NewChaCha8([32]byte{})
	write := func(name string, size int, mode os.FileMode) {
		b := make([]byte, size)
		random.Read(b)
		name = filepath.Join(root, name)
		err = errors.Join(err, os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, b, mode))
	}
	for i := range 400 {
		write(fmt.Sprintf("share/part %d/file-%d", i/20, i%20), i*60, 0o644)
	}
	write("bin/program", 12<<20, 0o755)
	return errors.Join(err, os.Symlink("program", root+"/bin/alias"))
}

// makeConfiguration makes the key pair, which is authorised as there is no other one, and what the
// publisher has to know of the items: without a daemon there is no database.
func (d *demo) makeConfiguration() error {
	var manifest strings.Builder
	for i, item := range d.items {
		references := ""
		if i > 0 {
			references = filepath.Base(d.items[i-1].path)
		}
		fmt.Fprintf(&manifest, "StorePath: %s\nReferences: %s\n\n", item.path, references)
	}
	return errors.Join(
		os.Mkdir(d.file("etc"), 0o755),
		keygen(d.file("etc/signing-key.pub"), d.file("etc/signing-key.sec")),
		os.WriteFile(d.file("etc/substitute-eris.toml"), []byte("policy = \"eris-first\"\n"), 0o644),
		os.WriteFile(d.file("manifest"), []byte(manifest.String()), 0o644),
	)
}

// narinfo asks the publisher about an item until it knows a read capability, for which it keeps
// others waiting some seconds only; a minute at most.
func (d *demo) narinfo(ctx context.Context, path string) (string, error) {
	url := d.mirror + "/" + filepath.Base(path)[:32] + ".narinfo"
	for begin := time.Now(); ; {
		response, err := http.Get(url) // the publisher ends with the context of all
		if err != nil {
			return "", err
		}
		text, err := io.ReadAll(io.LimitReader(response.Body, narinfo.MaxSize))
		response.Body.Close()
		if err == nil && response.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", url, response.Status)
		}
		if err != nil || strings.Contains(string(text), "\nERIS: ") || time.Since(begin) > time.Minute {
			return string(text), err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

func (d *demo) askAbout(ctx context.Context) error {
	want := ""
	for _, item := range d.items {
		want += item.path + "\n"
	}
	begin := time.Now()
	reply, _, err := d.ask(ctx, "--query", "have "+strings.ReplaceAll(want, "\n", " ")+d.file("store")+"/00000000000000000000000000000000-absent")
	if err != nil {
		return err
	}
	if reply != want+"\n" {
		return fmt.Errorf("the reply is %q instead of %q", reply, want+"\n")
	}
	d.Say("   %d of %d, the last of which nobody has, after %v\n", len(d.items), len(d.items)+1, since(begin))
	return nil
}

// downloading is what helpers say before the URL of a source.
const downloading = "Downloading "

// fetchAll has helpers fetch the items into a store that has nothing. From is how the URLs of the
// sources must begin.
func (d *demo) fetchAll(ctx context.Context, from string) error {
	if err := os.Mkdir(d.file("store"), 0o755); err != nil {
		return err
	}
	for left, tries := d.items, 0; len(left) > 0; {
		item, begin := left[0], time.Now()
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
		if got := hashText(sum); got != item.hash {
			return fmt.Errorf("%s has the hash %s instead of %s", item.path, got, item.hash)
		}
		source, _, _ := strings.Cut(said[strings.LastIndex(said, downloading)+len(downloading):], "...")
		if !strings.HasPrefix(source, from) {
			if tries++; tries < 20 { // our servers were late, as this machine stood still
				continue
			}
			return fmt.Errorf("%s has come from %q instead of %s", item.path, source, from)
		}
		rate := float64(item.size) / (1 << 20) / max(took.Seconds(), 0.001)
		d.Say("   %s\n     from %s\n     %v, %.0f MiB/s; hash checked: %s\n", filepath.Base(item.path), source, took, rate, item.hash)
		left = left[1:]
	}
	return nil
}

// command prepares this program to be run with another command, which knows nothing of the user's
// own Guix.
func (d *demo) command(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, d.program, args...)
	c.Dir = d.directory
	c.Env = []string{
		"PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.Getenv("TMPDIR"), "HOME=" + d.directory, "XDG_RUNTIME_DIR=" + d.directory,
		"GUIX_STATE_DIRECTORY=" + d.file("state"), "GUIX_CONFIGURATION_DIRECTORY=" + d.file("etc"), "NIX_STORE_DIR=" + d.file("store"),
	}
	// However this process ends, the child does not outlive it.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// ask starts a helper as guix-daemon does, sends it a request, and returns the reply and what else
// the helper says.
func (d *demo) ask(ctx context.Context, mode, request string) (reply, said string, err error) {
	replies, w, err := os.Pipe()
	if err != nil {
		return "", "", err
	}
	defer replies.Close()
	var output bytes.Buffer
	c := d.command(ctx, "substitute", mode)
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
		err = fmt.Errorf("substitute: %w\n%s", err, &output)
	}
	return string(text), output.String(), err
}

// start runs this program as a server until stop is called, and returns what follows in the line by
// which it says that it is ready.
func (d *demo) start(ctx context.Context, ready string, args ...string) (address string, stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	c := d.command(ctx, append(args, fmt.Sprintf("--user=%d", os.Geteuid()))...)
	c.Cancel = func() error { return c.Process.Signal(unix.SIGTERM) }
	c.WaitDelay = 20 * time.Second // until it is killed
	stderr, err := c.StderrPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		cancel()
		return "", nil, err
	}
	said := ""
	for lines := bufio.NewScanner(stderr); address == "" && lines.Scan(); {
		said += lines.Text() + "\n"
		_, address, _ = strings.Cut(lines.Text(), ready)
	}
	gone := make(chan struct{})
	go func() { // ends with the child, which stop waits for
		defer close(gone)
		io.Copy(io.Discard, stderr)
		c.Wait()
	}()
	stop = func() {
		cancel()
		<-gone
	}
	if address == "" {
		stop()
		return "", nil, fmt.Errorf("%s has ended:\n%s", args[0], said)
	}
	return address, stop, nil
}
