// SPDX-License-Identifier: GPL-3.0-or-later

// Package list has lists whose elements have their places in themselves, so that one is put in and
// taken out without memory and without search: requests, of which there are thousands.
package list

// Links is embedded by what can be in a [List].
type Links[T any] struct{ next, previous *T }

func (l *Links[T]) links() *Links[T] { return l }

// Next returns the element that follows in the list, or nil.
func (l *Links[T]) Next() *T { return l.next }

// List is elements in an order. The zero value is empty. An element is in one list at a time. It is
// for one goroutine at a time.
type List[T any, P interface {
	*T
	links() *Links[T]
}] struct{ first, last P }

// First returns the first element, or nil.
func (l *List[T, P]) First() P { return l.first }

// Push adds an element at the end.
func (l *List[T, P]) Push(x P) {
	*x.links() = Links[T]{}
	l.bind(l.last, x)
	l.bind(x, nil)
}

// bind makes two elements neighbours, nil being the ends.
func (l *List[T, P]) bind(a, b P) {
	if a == nil {
		l.first = b
	} else {
		a.links().next = b
	}
	if b == nil {
		l.last = a
	} else {
		b.links().previous = a
	}
}

// Remove takes an element out.
func (l *List[T, P]) Remove(x P) {
	at := x.links()
	l.bind(at.previous, at.next)
	*at = Links[T]{}
}
