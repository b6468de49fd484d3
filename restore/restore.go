// SPDX-License-Identifier: GPL-3.0-or-later

// Package restore is where the bytes of a store item go: it writes a stream of nodes in NAR order
// as files, in the canonical form that the daemon expects of a substitute, and computes the item's
// NarHash on the way. Start with [Restore].
//
// The nodes may come from anybody: nothing is ever written outside the destination or through a
// symbolic link, and whoever calls Restore compares the resulting hash with one that it trusts, and
// calls [Remove] when the two differ.
package restore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/nar"
)

// Options say how [Restore] works. The zero Options restore without de-duplication and without a
// limit.
type Options struct {
	// LinksDirectory is the directory of de-duplication links of the store, STORE/.links. Files of
	// at least 8192 bytes are shared through it; it is created when the first comes, and where
	// nodes name files that have their contents already, they become links to those. Empty turns
	// de-duplication off. It must be on the file system of the destination.
	LinksDirectory string
	// Damaged, if not nil, is called with the name of each file in LinksDirectory that had other
	// contents than it should have, and was removed; other store items may share it. It is called
	// from several goroutines.
	Damaged func(file string)
	// MaxBytes is the greatest length of the archive that the nodes may make, in bytes; 0 is no
	// limit. A tree beyond it fails before the excess is written.
	MaxBytes uint64
	// Writable gives the owner permission to write, what the umask permits to others, and leaves
	// times as they are, for trees that are not part of a store.
	Writable bool
}

// A Result is what was restored.
type Result struct {
	// NarHash is the SHA-256 of the archive of the restored tree.
	NarHash [sha256.Size]byte
	// NarSize is the length of that archive in bytes.
	NarSize uint64
}

const (
	// workers is how many files are created at the same time. More than cores, because file systems
	// wait for disks.
	workers = 4
	// maxPieces is how many pieces of contents a file is collected in before it is created. Files
	// of more pieces are written while they arrive. The feeders of nodes have many more buffers
	// than this, so that collecting never takes the last one.
	maxPieces = 8
	// smallPiece is the length in bytes below which a piece of contents is copied to the others of
	// its file instead of being kept: many of them would hold much memory with little in it, and
	// each would be written by itself, blocks of 1 KiB for example.
	smallPiece = 4 << 10
	// queuedFiles bounds the files that are complete but not created yet, each of up to maxPieces.
	queuedFiles = 8
	// maxDescriptors is how many directories are open files at a time. Of those on the way down the
	// last keptDescriptors stay open, and those in which files are being created; further ones are
	// closed from leaveFrom on. So what is above that is for directories that have only to be
	// completed, which workers do.
	maxDescriptors, leaveFrom, keptDescriptors = 64, 40, 16
)

// Restore writes the tree of nodes to destination and returns its NarHash and length. Directories
// get mode 0555, files 0444 or 0555, and everything the modification time 1 second after the Epoch
// (Guix, guix/serialization.scm: restore-file). The parent of destination must exist and
// destination must not. The umask of the process must leave read and execute permissions alone, but
// for trees that are not part of a store; 022 is what the daemon gives its helpers.
//
// It returns at the first error of nodes, of the file system or of ctx; whatever has been written
// by then stays, for [Remove]. Contents that cannot be shared through the links directory are kept
// as they are, without an error.
func Restore(ctx context.Context, nodes nar.Nodes, destination string, o Options) (Result, error) {
	parent, name, err := openParent(destination)
	if err != nil {
		return Result{}, err
	}
	defer unix.Close(parent)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	group, ctx := errgroup.WithContext(ctx)
	r := &restorer{
		ctx:         ctx,
		group:       group,
		nodes:       nodes,
		destination: destination,
		name:        name,
		limit:       o.MaxBytes,
		writable:    o.Writable,
		files:       make(chan *file, queuedFiles),
		descriptors: make(chan struct{}, maxDescriptors),
		hash:        nar.NewHasher(ctx),
		open:        []*directory{{fd: parent}},
	}
	if r.limit == 0 {
		r.limit = 1<<64 - 1
	}
	if o.LinksDirectory != "" {
		r.links = &links{path: o.LinksDirectory, damaged: o.Damaged, fd: -1}
		defer r.links.close()
	}
	failed := contained(r.plan)
	if failed != nil {
		cancel(failed)
		// The walk may have failed because something else had, or the other way round.
		if first := context.Cause(ctx); !errors.Is(first, errWalk) {
			failed = first
		}
	}
	if err := group.Wait(); failed == nil {
		failed = err
	}
	if failed != nil {
		r.abandon()
		return Result{}, failed
	}
	return r.result, nil
}

// IsFull reports whether an error says that the file system of a destination has no room for what
// was being restored, or the user none on it.
func IsFull(destination string, err error) bool {
	path, ok := errors.AsType[*os.PathError](err)
	return ok && strings.HasPrefix(path.Path, destination) && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT))
}

// errWalk is the error of a file of which no more contents come because the walk has failed, whose
// own error is what matters.
var errWalk = errors.New("the walk has failed")

// contained calls f. Whoever gives the nodes reads what comes from anybody; should it panic, that
// is the end of this restoration, but not of the process.
func contained(f func() error) (err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("internal error: %v", fault)
		}
	}()
	return f()
}

// canonicalTime is one second after the Epoch, for access and modification.
var canonicalTime = [2]unix.Timespec{{Sec: 1}, {Sec: 1}}

type restorer struct {
	ctx         context.Context
	nodes       nar.Nodes
	destination string
	name        string // of destination in its directory
	limit       uint64
	writable    bool
	links       *links // nil without de-duplication
	files       chan *file
	descriptors chan struct{} // one in it for each directory that is open, but the first

	// The rest belongs to plan.
	group   *errgroup.Group
	started int // of the workers
	pool    nar.Pool
	hash    *nar.Hasher
	result  Result
	open    []*directory // the path to the node under way; the first is the parent of destination
}

// A directory is complete when plan has seen its end and all of its entries are.
type directory struct {
	fd      int          // -1 between leave and enter
	inode   uint64       // from leave on
	parent  *directory   // nil: the parent of the destination, which is not ours to complete
	pending atomic.Int32 // itself, until its end, and each entry that is not complete
}

// plan walks the nodes: it makes directories, hands files to the workers and everything to the
// hash.
func (r *restorer) plan() error {
	defer close(r.files)
	defer func() { r.result = Result{r.hash.Finish(), r.hash.Size()} }()
	err := r.hash.Walk(r.nodes, r.node)
	if err == nil && r.hash.Size() > r.limit {
		err = r.tooLarge() // by what ends a file
	}
	return err
}

func (r *restorer) node(n nar.Node) error {
	if r.hash.Size() > r.limit {
		return r.tooLarge()
	}
	dir := r.open[len(r.open)-1]
	name := n.Name
	if len(r.open) == 1 {
		name = r.name
	}
	switch n.Kind {
	case nar.End:
		if err := r.enter(r.open[len(r.open)-2], dir.fd); err != nil {
			return err
		}
		r.open = r.open[:len(r.open)-1]
		return r.complete(dir)
	case nar.Directory:
		return r.directory(dir, name, n.Name)
	case nar.Symlink:
		err := files.Retry(func() error { return unix.Symlinkat(n.Target, dir.fd, name) })
		if err == nil && !r.writable {
			err = files.Retry(func() error {
				return unix.UtimesNanoAt(dir.fd, name, canonicalTime[:], unix.AT_SYMLINK_NOFOLLOW)
			})
		}
		if err != nil {
			return r.pathError("symlink", n.Name, err)
		}
		return nil
	}
	if n.Size > r.limit-r.hash.Size() {
		return r.tooLarge()
	}
	f := &file{directory: dir, name: name, size: n.Size, executable: n.Executable, unique: n.Unique}
	if linked, err := r.link(f, n.Same); linked || err != nil {
		return err
	}
	dir.pending.Add(1)
	return r.contents(f)
}

// directory makes a directory, which errors call something else if it is the root, and goes into
// it.
func (r *restorer) directory(parent *directory, name, shown string) error {
	if len(r.descriptors) >= leaveFrom {
		r.leave(r.open[1:max(1, len(r.open)-keptDescriptors)])
	}
	if err := r.reserve(); err != nil {
		return err
	}
	d, err := makeDirectory(parent, name)
	if err != nil {
		<-r.descriptors
		return r.pathError("mkdir", shown, err)
	}
	parent.pending.Add(1)
	r.open = append(r.open, d)
	if parent.parent == nil && !r.writable {
		// Or else a store would give its own access control list to all that is in it.
		unix.Fremovexattr(d.fd, "system.posix_acl_default")
	}
	return nil
}

// contents collects the contents of f and hands it to a worker: whole if it is small, else as a
// stream.
func (r *restorer) contents(f *file) error {
	err := r.pieces(f)
	switch {
	case f.stream != nil:
		close(f.stream)
	case err == nil:
		err = r.send(f)
	default:
		r.drop(f)
	}
	return err
}

func (r *restorer) pieces(f *file) error {
	for arrived := uint64(0); ; {
		c, err := r.nodes.Contents()
		if err == io.EOF {
			if arrived != f.size {
				return r.pathError("write", f.name, fmt.Errorf("%d bytes of contents instead of %d", arrived, f.size))
			}
			return nil
		} else if err != nil {
			return err
		}
		arrived += uint64(len(c.Bytes))
		// More contents than the node has said could be more than the limit.
		if arrived > f.size {
			c.Release()
			return r.pathError("write", f.name, errors.New("contents beyond their size"))
		}
		if err := r.hash.Contents(c); err != nil {
			c.Release()
			return err
		}
		if f.stream != nil {
			select {
			case f.stream <- c:
				continue
			case <-r.ctx.Done():
				c.Release()
				return r.ctx.Err()
			}
		}
		f.add(c)
		if len(f.pieces) >= maxPieces && f.arrived < f.size {
			f.stream = make(chan nar.Chunk, 1)
			if err := r.send(f); err != nil {
				return err
			}
		}
	}
}

// send hands a file to the workers, and starts another one if those that there are have enough to
// do: a tiny item is restored in less time than it takes to start several.
func (r *restorer) send(f *file) error {
	if len(r.open) == 1 && f.stream == nil {
		defer f.release()
		return r.create(f)
	}
	if r.started == 0 || r.started < workers && (len(r.files) > 0 || f.stream != nil) {
		r.started++
		r.group.Go(func() error { return contained(r.work) })
	}
	select {
	case r.files <- f:
		return nil
	case <-r.ctx.Done():
		r.drop(f)
		return r.ctx.Err()
	}
}

// drop lets go of a file that no worker has.
func (r *restorer) drop(f *file) {
	f.release()
	r.complete(f.directory)
}

func (r *restorer) tooLarge() error {
	return fmt.Errorf("%s: more than the %d bytes that it may have", r.destination, r.limit)
}

// pathError names the file of an error. The whole path below the destination is not known without a
// cost for each file.
func (r *restorer) pathError(op, name string, err error) error {
	path := r.destination
	if name != "" {
		path += "/…/" + name
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

// makeDirectory creates name in parent and opens it, never through a link.
func makeDirectory(parent *directory, name string) (*directory, error) {
	if err := files.Retry(func() error { return unix.Mkdirat(parent.fd, name, 0o755) }); err != nil {
		return nil, err
	}
	fd, err := files.OpenAt(parent.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	d := &directory{fd: fd, parent: parent}
	d.pending.Store(1) // plan, until the end of the directory
	return d, nil
}

// leave closes those of some directories on the way down in which nothing is being created: a
// process may have no more than a thousand open files, perhaps. Nobody uses them then, for each has
// a further directory on the way down, and pending counts that and itself.
func (r *restorer) leave(directories []*directory) {
	for _, d := range directories {
		var st unix.Stat_t
		if d.fd < 0 || d.pending.Load() > 2 || unix.Fstat(d.fd, &st) != nil {
			continue
		}
		unix.Close(d.fd)
		d.fd, d.inode = -1, st.Ino
		<-r.descriptors
	}
}

// enter opens a directory again that was left, from one in it.
func (r *restorer) enter(d *directory, child int) error {
	if d.fd >= 0 {
		return nil
	}
	if err := r.reserve(); err != nil {
		return err
	}
	fd, err := files.OpenAt(child, "..", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && st.Ino != d.inode {
			err = errors.New("a directory has been moved")
		}
		if err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		<-r.descriptors
		return r.pathError("open", "", err)
	}
	d.fd = fd
	return nil
}

// reserve waits until one more directory may be open.
func (r *restorer) reserve() error {
	select {
	case r.descriptors <- struct{}{}:
		return nil
	case <-r.ctx.Done():
		return r.ctx.Err()
	}
}

// complete takes one of the things away that d waits for; after the last one d gets its final mode
// and time, and its parent is told.
func (r *restorer) complete(d *directory) error {
	for d.parent != nil && d.pending.Add(-1) == 0 {
		if d.fd >= 0 { // else the walk has failed
			var err error
			if !r.writable {
				err = canonicalise(d.fd, 0o555)
			}
			unix.Close(d.fd)
			<-r.descriptors
			if err != nil {
				return r.pathError("chmod", "", err)
			}
		}
		d = d.parent
	}
	return nil
}

// abandon closes what is left open after an error.
func (r *restorer) abandon() {
	for f := range r.files {
		r.drop(f)
	}
	for _, d := range r.open {
		r.complete(d)
	}
}
