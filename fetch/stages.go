// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import "codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"

// Within returns a source that says of all requests that the blocks are of the item with a root,
// and tells how many bytes each block has that has come. Got may be nil; it is called from any
// goroutine, and must not wait. Closing it closes the source.
func Within(source Source, root eris.Reference, got func(bytes int)) Source {
	w := &within{Source: source, root: root, got: got}
	w.done = w.count
	return w
}

type within struct {
	Source
	root eris.Reference
	got  func(bytes int)
	done func(r *Request) // count, as a value
}

func (w *within) Start(r *Request) {
	r.Root = w.root
	r.outer, r.Done = append(r.outer, r.Done), w.done
	w.Source.Start(r)
}

func (w *within) count(r *Request) {
	if r.Err == nil && w.got != nil {
		w.got(len(r.Block))
	}
	last := len(r.outer) - 1 // others may stand in front of this one
	r.Done, r.outer = r.outer[last], r.outer[:last]
	r.Done(r)
}
