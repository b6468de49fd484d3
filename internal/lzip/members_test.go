// SPDX-License-Identifier: GPL-3.0-or-later

package lzip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"
	"testing/iotest"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/benchdata"
)

// collect reads all of z and returns how many jobs there were at most at a time.
func collect(z *Reader) (data []byte, jobs int, err error) {
	for {
		p, err := z.Next()
		jobs = max(jobs, len(z.jobs))
		if err == io.EOF {
			return data, jobs, nil
		}
		if err != nil {
			return data, jobs, err
		}
		data = append(data, p...)
	}
}

func TestMembers(t *testing.T) {
	big := [][]byte{benchdata.Words(20, 80000), bytes.Repeat(noise(20, 10000), 9), make([]byte, 150000)}
	const least = 70000 // bytes of data
	var members [][]byte
	for _, b := range big {
		members = append(members, compress(t, b, code64K))
	}
	small := benchdata.Words(21, 5000)
	smallMember := compress(t, small, code4K)
	var compressed, want []byte
	for i := range 9 {
		compressed = append(compressed, members[i%3]...)
		want = append(want, big[i%3]...)
		if i == 5 {
			compressed = append(compressed, smallMember...)
			want = append(want, small...)
		}
	}
	for _, workers := range []int{1, 2, 5} {
		for name, source := range sources {
			if name == "one byte" && workers != 2 {
				continue
			}
			z := NewReader(source(bytes.NewReader(compressed)), Options{Workers: workers})
			z.leastJob = least
			got, jobs, err := collect(z)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d workers, %s: %d bytes, %v", workers, name, len(got), err)
			}
			if jobs > workers || workers > 1 && jobs < 2 || workers == 1 && jobs > 0 {
				t.Errorf("%d workers, %s: %d members at a time", workers, name, jobs)
			}
			z.Close()
		}
	}

	// No room, no jobs.
	z := NewReader(bytes.NewReader(compressed), Options{Workers: 4, Lookahead: 80000})
	z.leastJob = least
	if got, jobs, err := collect(z); err != nil || jobs != 0 || !bytes.Equal(got, want) {
		t.Errorf("no room: %d jobs, %v", jobs, err)
	}
	z.Close()

	// Room for some.
	z = NewReader(bytes.NewReader(compressed), Options{Workers: 6, Lookahead: 600000})
	z.leastJob = least
	if got, jobs, err := collect(z); err != nil || jobs < 1 || jobs > 5 || !bytes.Equal(got, want) {
		t.Errorf("little room: %d jobs, %v", jobs, err)
	}
	z.Close()

	// Garbage at the end, and an end too early, everywhere in the last members.
	for _, garbage := range []string{"garbage", magic, "L", string(smallMember[:len(smallMember)-1])} {
		z := NewReader(bytes.NewReader(append(bytes.Clone(compressed), garbage...)), Options{Workers: 3})
		z.leastJob = least
		got, _, err := collect(z)
		if !errors.Is(err, ErrFormat) && err != io.ErrUnexpectedEOF || !bytes.HasPrefix(got, want) {
			t.Errorf("%q at the end: %v", garbage[:1], err)
		}
		z.Close()
	}
	for cut := 1; cut < len(members[2]); cut += 5 {
		z := NewReader(bytes.NewReader(compressed[:len(compressed)-cut]), Options{Workers: 3})
		z.leastJob = least
		got, _, err := collect(z)
		if err != io.ErrUnexpectedEOF || !bytes.HasPrefix(want, got) {
			t.Errorf("cut by %d bytes: %v", cut, err)
		}
		z.Close()
	}

	// The error of a source that fails comes after what was read before.
	broken := errors.New("broken")
	z = NewReader(io.MultiReader(bytes.NewReader(compressed), iotest.ErrReader(broken)), Options{Workers: 3})
	z.leastJob = least
	if got, _, err := collect(z); err != broken || !bytes.Equal(got, want) {
		t.Errorf("broken source: %d bytes, %v", len(got), err)
	}
	z.Close()
}

func TestMembersDamaged(t *testing.T) {
	data := benchdata.Words(22, 70000)
	m := compress(t, data, code64K)
	for damaged := range 5 {
		for _, offset := range []int{0, 5, 6, 40, len(m) / 2, len(m) - 20, len(m) - 12, len(m) - 3} {
			var compressed []byte
			for i := range 5 {
				compressed = append(compressed, m...)
				if i == damaged {
					compressed[len(compressed)-len(m)+offset] ^= 0x5A
				}
			}
			z := NewReader(bytes.NewReader(compressed), Options{Workers: 3})
			z.leastJob = 1
			got, _, err := collect(z)
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrDictionary) && err != io.ErrUnexpectedEOF {
				t.Errorf("member %d, offset %d: %v", damaged, offset, err)
			}
			if len(got) < damaged*len(data) || !bytes.Equal(got[:damaged*len(data)], bytes.Repeat(data, damaged)) {
				t.Errorf("member %d, offset %d: %d bytes before the damage", damaged, offset, len(got))
			}
			z.Close()
		}
	}
}

// withFalseEnd makes a member in the midst of which there is what ends a member and
// begins another one: a data size, a size that is right, and a header.
func withFalseEnd(t *testing.T, before, after []byte) (member, data []byte) {
	for try := range uint64(50) {
		e := newMemberEncoder()
		for _, c := range before {
			e.literal(c)
		}
		for _, c := range benchdata.Words(try, 500) { // makes literals likely
			e.literal(c)
		}
		// Four bytes more are settled by where the interval lies; go on
		// in its middle.
		end := headerSize + len(e.out) + e.pending + 4 + 16
		target := binary.LittleEndian.AppendUint64(nil, 1<<20)
		target = binary.LittleEndian.AppendUint64(target, uint64(end))
		target = append(target, magic...)
		target = append(target, code64K)
		e.target = append(bytes.Clone(target), 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55)
		e.follow, e.code = true, e.rng/2
		ok := true
		for ok && len(e.target) > 0 {
			ok = e.literal(0)
		}
		e.follow = false
		if !ok {
			continue
		}
		for _, c := range after {
			e.literal(c)
		}
		data := bytes.Clone(e.data)
		m := e.member(code64K)
		if bytes.HasPrefix(m[end-16:], target) {
			return m, data
		}
	}
	t.Fatal("no member with a false end could be made")
	return nil, nil
}

func TestFalseEnd(t *testing.T) {
	data := benchdata.Words(23, 50000)
	good := compress(t, data, code64K)
	for _, before := range []int{0, 20000, 150000} {
		bad, badData := withFalseEnd(t, benchdata.Words(24, before), noise(25, 50000))
		compressed := bytes.Join([][]byte{good, good, bad, good, bad, good}, nil)
		want := bytes.Join([][]byte{data, data, badData, data, badData, data}, nil)

		// The scan must take it for an end, or this tests nothing.
		f := feed{data: rope{parts: [][]byte{bad}, size: len(bad)}, err: io.EOF}
		if end := f.findEnd(); end < 0 || end >= len(bad) {
			t.Fatalf("the false end is not found: %d of %d", end, len(bad))
		}
		for name, source := range sources {
			if name == "one byte" {
				continue
			}
			z := NewReader(source(bytes.NewReader(compressed)), Options{Workers: 4})
			z.leastJob = 1
			got, jobs, err := collect(z)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes before, %s: %d bytes, %v", before, name, len(got), err)
			}
			if jobs == 0 || z.options.Workers != 1 {
				t.Errorf("%d bytes before, %s: no guess was taken back", before, name)
			}
			z.Close()
		}
	}
}

func TestTinyMembers(t *testing.T) {
	m := compress(t, nil, code4K)
	n := 5000
	big := compress(t, make([]byte, 300000), code4K)
	compressed := append(bytes.Clone(big), bytes.Repeat(m, n)...)
	compressed = append(compressed, big...)
	z := NewReader(bytes.NewReader(compressed), Options{Workers: 4})
	defer z.Close()
	got, jobs, err := collect(z)
	if err != nil || len(got) != 600000 || jobs != 0 || z.members != n+2 {
		t.Errorf("%d bytes, %d members, %d jobs, %v", len(got), z.members, jobs, err)
	}
}

// TestClose: wherever decoding is given up, no goroutine is left.
func TestClose(t *testing.T) {
	compressed := bytes.Repeat(compress(t, benchdata.Words(26, 90000), code64K), 6)
	before := runtime.NumGoroutine()
	for pieces := range 15 {
		z := NewReader(bytes.NewReader(compressed), Options{Workers: 4})
		z.leastJob = 1
		for range pieces {
			if _, err := z.Next(); err != nil && err != io.EOF {
				t.Fatal(err)
			}
		}
		z.Close()
		z.Close()
		// One that has said that it is done needs a moment to be gone.
		for i := 0; runtime.NumGoroutine() > before; i++ {
			if i == 100000 {
				t.Fatalf("goroutines left after %d pieces", pieces)
			}
			runtime.Gosched()
		}
	}
}

func TestRope(t *testing.T) {
	text := []byte("....LZIP\x01....LZIPLZIP\x01..LZLZIP\x01")
	// In all ways to divide it into parts.
	for cuts := range 1 << 10 {
		var r rope
		from := 0
		for i := range text {
			if i%3 == 0 && cuts>>(i/3)&1 == 1 && i > from {
				r.append(rope{parts: [][]byte{text[from:i]}, size: i - from})
				from = i
			}
		}
		r.append(rope{parts: [][]byte{text[from:]}, size: len(text) - from})
		for i := range len(text) + 1 {
			want := bytes.Index(text[i:], []byte(magic))
			if want >= 0 {
				want += i
			}
			if got := r.index(i); got != want {
				t.Fatalf("cuts %b: index(%d) = %d instead of %d", cuts, i, got, want)
			}
		}
		head := r.cut(10)
		head.append(r)
		got := make([]byte, 100)
		if n := head.read(got); !bytes.Equal(got[:n], text) || head.size != 0 {
			t.Fatalf("cuts %b: read %q", cuts, got[:n])
		}
	}
}
