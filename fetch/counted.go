// SPDX-License-Identifier: GPL-3.0-or-later

package fetch

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
