// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/nixbase32"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

const demoUsage = `Usage: guix-substitute-eris demo [OPTION]...
Serve the store items of testdata/guix-mirror on loopback, and have this program
query and fetch them into a private directory, as guix-daemon would. Nothing
outside that directory is touched, and it is removed at the end.
`

// demoCommand shows the whole way.
func demoCommand(args []string) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	mirror := flags.String("mirror", "testdata/guix-mirror", "serve the mirror in `DIRECTORY`")
	if status, ok := parse(flags, args, demoUsage); !ok {
		return status
	}
	if err := demo(os.Stdout, *mirror); err != nil {
		return fail("%v", err)
	}
	return 0
}

// demoItems are the items that the demonstration fetches.
var demoItems = []string{"text", "shapes", "many", "symlink"}

func demo(w io.Writer, mirror string) (err error) {
	items, err := readItems(filepath.Join(mirror, "items.txt"))
	if err != nil {
		return fmt.Errorf("%w (run this in the source directory, or use --mirror)", err)
	}
	directory, err := os.MkdirTemp("", "guix-substitute-eris-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, restore.Remove(directory)) }()
	url, stop, err := serveMirror(mirror)
	if err != nil {
		return err
	}
	defer stop()
	fmt.Fprintf(w, "Serving %s at %s.\nThe private directory is %s.\n", mirror, url, directory)
	d := &demoDaemon{mirror: mirror, directory: directory, url: url}

	fmt.Fprintf(w, "\nThe daemon asks which of %d items are available:\n", len(items))
	var all []string
	for _, path := range items {
		all = append(all, path)
	}
	begin := time.Now()
	reply, err := d.ask("--query", "have "+strings.Join(all, " "))
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "  %d are (%v).\n", strings.Count(reply, "/gnu/store/"), time.Since(begin).Round(time.Millisecond))

	for _, name := range demoItems {
		path := items[name]
		destination := filepath.Join(directory, filepath.Base(path))
		fmt.Fprintf(w, "\nThe daemon has %s fetched:\n", path)
		begin := time.Now()
		reply, err := d.ask("--substitute", "substitute "+path+" "+destination)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "  %s (%v)\n", strings.TrimSpace(reply), time.Since(begin).Round(time.Millisecond))
		h := sha256.New()
		if _, err := nar.Write(h, nar.NewTree(destination)); err != nil {
			return err
		}
		hash := "sha256:" + nixbase32.EncodeToString(h.Sum(nil))
		if !strings.HasPrefix(reply, "success "+hash+" ") {
			return fmt.Errorf("%s has the hash %s", destination, hash)
		}
		fmt.Fprintf(w, "  %s has that hash.\n", destination)
	}
	fmt.Fprintln(w, "\nAll is well.")
	return nil
}

// readItems reads lines of a name and a store item.
func readItems(name string) (map[string]string, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	items := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if name, path, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			items[name] = path
		}
	}
	return items, nil
}

// serveMirror serves the narinfos and nars of a directory on loopback.
func serveMirror(mirror string) (url string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/nar/", http.FileServer(http.Dir(mirror)))
	mux.Handle("/", http.FileServer(http.Dir(filepath.Join(mirror, "all"))))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	var wait sync.WaitGroup
	wait.Go(func() { server.Serve(l) })
	return "http://" + l.Addr().String(), func() { server.Close(); wait.Wait() }, nil
}

// demoDaemon starts this program as the daemon does.
type demoDaemon struct {
	mirror, directory, url string
}

// ask starts a helper, sends it one request, and returns its reply.
func (d *demoDaemon) ask(mode, request string) (reply string, err error) {
	program, err := os.Executable()
	if err != nil {
		return "", err
	}
	replies, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer replies.Close()
	var log bytes.Buffer
	cmd := exec.Command(program, "substitute", mode, "--acl="+filepath.Join(d.mirror, "acl"))
	cmd.Stdin = strings.NewReader(request + "\n")
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.ExtraFiles = []*os.File{nil, w} // descriptors 3 and 4
	cmd.Env = append(os.Environ(),
		"_NIX_OPTIONS=substitute-urls="+d.url+"\n",
		"GUIX_STATE_DIRECTORY="+filepath.Join(d.directory, "state"),
		"GUIX_CONFIGURATION_DIRECTORY="+filepath.Join(d.directory, "etc"),
		"NIX_STORE_DIR=/gnu/store",
		"XDG_CACHE_HOME=",
	)
	err = cmd.Start()
	w.Close()
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(bufio.NewReader(replies))
	if err2 := cmd.Wait(); err == nil && err2 != nil {
		err = fmt.Errorf("%w: %s", err2, log.String())
	}
	return string(b), err
}
