// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/acl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/narinfo"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

// A workshop is what the rows work with.
type workshop struct {
	directory string
	size      int
	runs      int
	binary    string // the program
	before    string // the same of another commit; empty if that is not measured
	key       *acl.SigningKey
	url       string // of a server of everything in www
	slowURL   string // the same, 50 ms away
	storeURL  string // of a block store, if it has been started
	storeTCP  string // the same by TCP
	closers   []func()
	items     map[string]*benchItem
}

// benchItem is a store item that is on the server.
type benchItem struct {
	name string
	path string // store path
	tree string // where it is
	size int64  // of its archive
}

func (w *workshop) close() {
	for i := len(w.closers) - 1; i >= 0; i-- {
		w.closers[i]()
	}
	restore.Remove(w.directory)
}

func (w *workshop) www() string { return filepath.Join(w.directory, "www") }

// prepare builds the program, makes the items and starts the servers.
func (w *workshop) prepare() error {
	source, err := root()
	if err != nil {
		return err
	}
	w.binary = filepath.Join(w.directory, "guix-substitute-eris")
	build := exec.Command("go", "build", "-o", w.binary, "./cmd/guix-substitute-eris")
	build.Dir = source
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building: %w: %s", err, out)
	}
	// What the linker has written and what was copied, or is on another file system, start in
	// different times: a millisecond of three.
	for name, program := range map[string]*string{"ours": &w.binary, "before": &w.before} {
		if *program == "" {
			continue
		}
		text, err := os.ReadFile(*program)
		*program = filepath.Join(w.directory, name)
		if err := errors.Join(err, os.MkdirAll(filepath.Dir(*program), 0o755), os.WriteFile(*program, text, 0o755)); err != nil {
			return err
		}
	}
	for _, d := range []string{"www/nar", "etc", "trees", "store", "out"} {
		if err := os.MkdirAll(filepath.Join(w.directory, d), 0o755); err != nil {
			return err
		}
	}
	w.key = acl.GenerateSigningKey()
	if err := os.WriteFile(filepath.Join(w.directory, "etc", "acl"), []byte(acl.NewACL(w.key.PublicKey()).Text()), 0o644); err != nil {
		return err
	}
	w.items = map[string]*benchItem{}
	return w.serve()
}

// serve starts nginx, or a server of our own where it is not installed.
func (w *workshop) serve() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := l.Addr().String()
	w.url = "http://" + address
	if program, err := exec.LookPath("nginx"); err == nil {
		l.Close()
		configuration := filepath.Join(w.directory, "nginx.conf")
		text := fmt.Sprintf(`daemon off; worker_processes 1; pid %[1]s/nginx.pid; error_log /dev/null;
events { worker_connections 1000; }
http { access_log off; keepalive_requests 100000; sendfile on; default_type application/octet-stream;
client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
server { listen %[2]s; root %[3]s; } }
`, w.directory, address, w.www())
		if os.Geteuid() == 0 {
			text = "user root;\n" + text
		}
		if err := os.WriteFile(configuration, []byte(text), 0o644); err != nil {
			return err
		}
		server := exec.Command(program, "-c", configuration)
		if err := server.Start(); err != nil {
			return err
		}
		w.closers = append(w.closers, func() { server.Process.Signal(syscall.SIGTERM); server.Wait() }) // its workers, too
		for range 100 {
			if conn, err := net.Dial("tcp", address); err == nil {
				conn.Close()
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	} else {
		server := &http.Server{Handler: http.FileServer(http.Dir(w.www()))}
		go server.Serve(l)
		w.closers = append(w.closers, func() { server.Close() })
	}
	relay, stop, err := delayed(address, 50*time.Millisecond)
	if err != nil {
		return err
	}
	w.slowURL = "http://" + relay
	w.closers = append(w.closers, stop)
	return nil
}

// item makes a store item with a function that fills a tree, and publishes it with the given
// compressions.
func (w *workshop) item(name string, fill func(tree string) error, compressions ...string) (*benchItem, error) {
	if it := w.items[name]; it != nil {
		return it, nil
	}
	sum := sha256.Sum256([]byte(name))
	hash := fmt.Sprintf("%032x", sum[:16])
	hash = strings.NewReplacer("e", "g", "o", "p", "t", "q", "u", "v").Replace(hash)
	it := &benchItem{name: name, path: "/gnu/store/" + hash + "-" + name, tree: filepath.Join(w.directory, "trees", hash+"-"+name)}
	if err := fill(it.tree); err != nil {
		return nil, err
	}
	digest, size, err := w.nar(it, compressions)
	if err != nil {
		return nil, err
	}
	it.size = size
	var urls []narinfo.URL
	for _, c := range compressions {
		urls = append(urls, narinfo.URL{URL: "nar/" + c + "/" + name, Compression: c})
	}
	if err := w.publish(it.path, digest, uint64(size), urls); err != nil {
		return nil, err
	}
	w.items[name] = it
	return it, nil
}

// publish writes a signed narinfo.
func (w *workshop) publish(path string, digest [32]byte, size uint64, urls []narinfo.URL) error {
	return w.publishInfo(&narinfo.Narinfo{StorePath: path, NarDigest: digest, NarSize: size}, urls)
}

func (w *workshop) publishInfo(n *narinfo.Narinfo, urls []narinfo.URL) error {
	part, err := narinfo.SignedPart(n)
	if err != nil {
		return err
	}
	signature, err := w.key.Sign(sha256.Sum256([]byte(part)), "bench")
	if err != nil {
		return err
	}
	text, err := narinfo.Text(part, signature, urls)
	if err != nil {
		return err
	}
	hash, _, _ := strings.Cut(filepath.Base(n.StorePath), "-")
	return os.WriteFile(filepath.Join(w.www(), hash+".narinfo"), []byte(text), 0o644)
}

// nar writes the nar of an item in all compressions, and returns its hash and length.
func (w *workshop) nar(it *benchItem, compressions []string) (digest [32]byte, size int64, err error) {
	h := sha256.New()
	writers := []io.Writer{h}
	var closers []io.Closer
	for _, c := range compressions {
		d := filepath.Join(w.www(), "nar", c)
		if err := os.MkdirAll(d, 0o755); err != nil {
			return digest, 0, err
		}
		f, err := os.Create(filepath.Join(d, it.name))
		if err != nil {
			return digest, 0, err
		}
		defer f.Close()
		var z io.WriteCloser
		switch c {
		case "none":
			z = f
		case "gzip":
			z, err = gzip.NewWriterLevel(f, 9)
		case "zstd":
			z, err = zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedBestCompression))
		case "lzip":
			z, err = lzipWriter(f)
		}
		if err != nil {
			return digest, 0, err
		}
		writers = append(writers, z)
		closers = append(closers, z)
	}
	size, err = nar.Write(io.MultiWriter(writers...), nar.NewTree(it.tree))
	for _, c := range closers {
		err = errors.Join(err, c.Close())
	}
	h.Sum(digest[:0])
	return digest, size, err
}

// lzipWriter compresses with the program of that name.
func lzipWriter(f *os.File) (io.WriteCloser, error) {
	program, err := lzip()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, "-6", "-c")
	cmd.Stdout = f
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &pipedProgram{in, cmd}, nil
}

type pipedProgram struct {
	io.WriteCloser
	cmd *exec.Cmd
}

func (p *pipedProgram) Close() error { return errors.Join(p.WriteCloser.Close(), p.cmd.Wait()) }

// lzip finds the program itself rather than one that takes its name.
func lzip() (string, error) {
	for _, name := range []string{"lzip.lzip", "lzip"} {
		if path, err := exec.LookPath(name); err == nil {
			out, _ := exec.Command(path, "--version").Output()
			if bytes.HasPrefix(out, []byte("lzip ")) {
				return path, nil
			}
		}
	}
	return "", errors.New("lzip is not installed")
}

// fillFiles fills a tree with files of given lengths, with contents like those of store items.
func fillFiles(sizes []int) func(string) error {
	return func(tree string) error {
		total := 0
		for _, n := range sizes {
			total += n
		}
		data := archive(total)
		for i, n := range sizes {
			name := filepath.Join(tree, fmt.Sprintf("lib/%02d/file-%05d", i%50, i))
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
			mode := os.FileMode(0o644)
			if i%7 == 0 {
				mode = 0o755
			}
			if err := os.WriteFile(name, data[:n], mode); err != nil {
				return err
			}
			data = data[n:]
		}
		return nil
	}
}

// sizesOf returns n lengths, of a kind that occurs, with a given sum.
func sizesOf(n, total int) []int {
	r := rand.New(rand.NewPCG(uint64(n), 7))
	weights := make([]float64, n)
	sum := 0.0
	for i := range weights {
		weights[i] = r.ExpFloat64()
		sum += weights[i]
	}
	sizes := make([]int, n)
	for i := range sizes {
		sizes[i] = int(float64(total) * weights[i] / sum)
	}
	return sizes
}

// delayed relays connections to an address that is a round trip time away.
func delayed(to string, rtt time.Duration) (address string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				time.Sleep(rtt) // the handshake
				out, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer out.Close()
				go relay(out, in, rtt/2)
				relay(in, out, rtt/2)
			}()
		}
	})
	return l.Addr().String(), func() { l.Close(); wait.Wait() }, nil
}

// relay copies what comes, later.
func relay(dst, src net.Conn, delay time.Duration) {
	type piece struct {
		bytes []byte
		due   time.Time
	}
	pieces := make(chan piece, 4096)
	go func() {
		defer close(pieces)
		for {
			p := make([]byte, 32<<10)
			n, err := src.Read(p)
			if n > 0 {
				pieces <- piece{p[:n], time.Now().Add(delay)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := dst.Write(p.bytes); err != nil {
			src.Close()
		}
	}
	if c, ok := dst.(*net.TCPConn); ok {
		c.CloseWrite()
	}
}
