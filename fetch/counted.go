// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

import "codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"

// Counted returns a source that tells how many bytes each block has that has come from another one.
// got is called from any goroutine, and must not wait. Closing it closes the other one.
func Counted(source Source, got func(bytes int)) Source {
	c := &counted{Source: source, got: got}
	c.done = c.count
	return c
}

type counted struct {
	Source
	got  func(bytes int)
	done func(r *Request) // count, as a value
}

func (c *counted) Start(r *Request) {
	r.intercept(c.done)
	c.Source.Start(r)
}

func (c *counted) count(r *Request) {
	if r.Err == nil {
		c.got(len(r.Block))
	}
	r.proceed()
}

// Within returns a source that says of all requests that the blocks are of the item with a root.
// Closing it closes the other one.
func Within(source Source, root eris.Reference) Source { return within{source, root} }

type within struct {
	Source
	root eris.Reference
}

func (w within) Start(r *Request) {
	r.Root = w.root
	w.Source.Start(r)
}
