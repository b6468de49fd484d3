// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/substitute"
)

// file returns the file name of an item that has a hash made of one letter.
func file(letter, name string) string {
	return "/gnu/store/" + strings.Repeat(letter, 32) + "-" + name
}

// takeAll takes up to n items in the order of the plan.
func takeAll(p *plan, n int) []string {
	var list []string
	for range n {
		item, ok := p.next()
		if !ok {
			break
		}
		p.take(item.Path)
		list = append(list, item.Path)
	}
	return list
}

func TestPlanOrder(t *testing.T) {
	glibc, gcc, zlib, hello, libc := file("z", "glibc-2.39"), file("y", "gcc-14-lib"), file("x", "zlib-1.3"),
		file("w", "hello-2.12"), file("a", "glibc-2.39")
	inStore := map[string]bool{file("s", "bash-5"): true}
	p := newPlan(func(path string) bool { return inStore[path] })
	p.add(substitute.Item{Path: hello, References: []string{hello, glibc, gcc, file("s", "bash-5")}})
	if item, ok := p.next(); ok {
		t.Errorf("%v is ready although references are not known", item)
	}
	p.add(substitute.Item{Path: zlib})
	p.add(substitute.Item{Path: gcc, References: []string{glibc}})
	p.add(substitute.Item{Path: glibc})
	p.add(substitute.Item{Path: libc}) // of the same name: by file name
	p.add(substitute.Item{Path: libc, References: []string{zlib}})
	p.add(substitute.Item{Path: file("s", "bash-5")})
	if p.left != 5 {
		t.Errorf("%d are left", p.left)
	}
	// Of those that are ready by name: glibc makes gcc ready, which comes before zlib, and so
	// does hello.
	p.take(libc)
	if got, want := takeAll(p, 10), []string{glibc, gcc, hello, zlib}; !slices.Equal(got, want) {
		t.Errorf("order is %v, not %v", got, want)
	}
	if p.left != 0 {
		t.Errorf("%d are left in the end", p.left)
	}
	// What the daemon has asked for before it was known makes others ready.
	early, late := file("e", "early"), file("l", "late")
	p.take(early)
	p.add(substitute.Item{Path: late, References: []string{early}})
	p.add(substitute.Item{Path: early})
	if got := takeAll(p, 10); !slices.Equal(got, []string{late}) {
		t.Errorf("then come %v", got)
	}
}

// The order is that of a daemon with one build slot, which is played here as build.cc has it.
func TestPlanOrderIsThatOfTheDaemon(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		n := 1 + random.IntN(40)
		items := make([]substitute.Item, n)
		for i := range items {
			letter := string(rune('a' + random.IntN(26)))
			items[i].Path = file(letter, fmt.Sprintf("p%d-%d", random.IntN(20), i))
			for range random.IntN(4) {
				if i > 0 {
					items[i].References = append(items[i].References, items[random.IntN(i)].Path)
				}
			}
		}
		p := newPlan(func(string) bool { return false })
		for _, i := range random.Perm(n) {
			p.add(items[i])
		}
		got := takeAll(p, n)
		valid := map[string]bool{}
		key := func(path string) string { return "a$" + path[len("/gnu/store/")+33:] + "$" + path }
		for k := range n {
			first := ""
			for _, item := range items {
				ready := !valid[item.Path]
				for _, r := range item.References {
					ready = ready && valid[r]
				}
				if ready && (first == "" || key(item.Path) < key(first)) {
					first = item.Path
				}
			}
			if k >= len(got) || got[k] != first {
				t.Fatalf("order is %v, and at %d the daemon asks for %s", got, k, first)
			}
			valid[first] = true
		}
	}
}

// TestPlanAgain has items fail: they come again when something has succeeded since, but not for
// ever, and not once the daemon has asked for them itself.
func TestPlanAgain(t *testing.T) {
	asked, bad := file("a", "asked"), file("b", "bad")
	p := newPlan(func(string) bool { return false })
	for _, path := range []string{asked, bad} {
		p.add(substitute.Item{Path: path})
	}
	fail := func(want ...string) {
		t.Helper()
		got := takeAll(p, 10)
		if !slices.Equal(got, want) {
			t.Errorf("next are %v, not %v", got, want)
		}
		for _, path := range got {
			p.fail(path)
		}
	}
	fail(asked, bad)
	fail()
	p.take(asked)
	p.again()
	fail(bad)
	p.again()
	fail(bad)
	p.again()
	fail()
	if p.left != 0 {
		t.Errorf("%d are left in the end", p.left)
	}
}

func TestPlanBounded(t *testing.T) {
	p := newPlan(func(string) bool { return false })
	for i := range maxPlanned + 10 {
		p.add(substitute.Item{Path: file("a", fmt.Sprint(i)), References: []string{file("c", fmt.Sprint(i))}})
		p.take(file("b", fmt.Sprint(i)))
	}
	if len(p.items) != maxPlanned {
		t.Errorf("%d items", len(p.items))
	}
}
