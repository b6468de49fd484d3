// SPDX-License-Identifier: GPL-3.0-or-later

package peers

import (
	"math"
	"math/rand/v2"
	"testing"
)

// world is a model of many machines that share what they have: who has which items.
type world struct {
	popularity []float64 // of an item: the share of machines that have it
	has        [][]bool  // by machine and item
	demand     []float64 // sums of popularities
}

// newWorld makes a world in which a machine has so many items on average. The popularity of items
// falls with their rank, as r^-0.9, from those that everybody has.
func newWorld(machines, items int, mean float64, r *rand.Rand) *world {
	w := &world{popularity: make([]float64, items), demand: make([]float64, items)}
	low, high := 0.0, float64(items)
	for range 60 {
		c, sum := (low+high)/2, 0.0
		for i := range items {
			w.popularity[i] = min(1, c/math.Pow(float64(i+1), 0.9))
			sum += w.popularity[i]
			w.demand[i] = sum
		}
		if sum > mean {
			high = c
		} else {
			low = c
		}
	}
	for range machines {
		has := make([]bool, items)
		for i := range has {
			has[i] = r.Float64() < w.popularity[i]
		}
		w.has = append(w.has, has)
	}
	return w
}

// wanted returns an item that somebody wants who does not have it: as popular as what machines
// have.
func (w *world) wanted(client int, r *rand.Rand) int {
	for {
		x := r.Float64() * w.demand[len(w.demand)-1]
		low, high := 0, len(w.demand)-1
		for low < high {
			if middle := (low + high) / 2; w.demand[middle] < x {
				low = middle + 1
			} else {
				high = middle
			}
		}
		if !w.has[client][low] {
			return low
		}
	}
}

// reach returns the share of wanted items that a client finds who asks so many machines, each of
// which asks further ones.
func (w *world) reach(known, further int, r *rand.Rand) float64 {
	const samples = 4000
	found := 0
	for range samples {
		client := r.IntN(len(w.has))
		item := w.wanted(client, r)
		for range known {
			m := r.IntN(len(w.has))
			there := w.has[m][item]
			for range further {
				there = there || w.has[r.IntN(len(w.has))][item]
			}
			if there {
				found++
				break
			}
		}
	}
	return float64(found) / samples
}

// TestReach computes the table in docs/peers.md: what share of what is wanted 1 000 machines offer
// to one that knows some of them.
func TestReach(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	w := newWorld(1000, 20000, 1500, r)
	for _, v := range []struct {
		known, further int
		want           float64 // as docs/peers.md has it
	}{
		{1, 0, 0.14}, {4, 0, 0.38}, {8, 0, 0.52}, {20, 0, 0.73}, {63, 0, 0.93}, {1, 8, 0.55}, {8, 8, 0.95}, {20, 8, 1},
	} {
		got := w.reach(v.known, v.further, r)
		t.Logf("%d known, each with %d further: %.3f", v.known, v.further, got)
		if math.Abs(got-v.want) > 0.03 {
			t.Errorf("%d known, each with %d further: %.2f instead of %.2f", v.known, v.further, got, v.want)
		}
	}
}
