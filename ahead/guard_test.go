// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"os/signal"
	"strings"
	"testing"
)

// What counts is the last line that is whole; what else comes is passed over, however long.
func TestCleanAfterCounts(t *testing.T) {
	defer signal.Reset()
	want := Stats{Staged: Count{3, 300}, Used: Count{2, 200}}
	for _, input := range []string{
		"1 100 0 0\n3 300 2 200\n", "3 300 2 200\n4 4\n\nx 5 5 5\n", "3 300 2 200\n" + strings.Repeat("x", 1<<20),
	} {
		if got := CleanAfter(strings.NewReader(input), t.TempDir(), "1-1"); got != want {
			t.Errorf("%.40q: %+v", input, got)
		}
	}
	if got := CleanAfter(strings.NewReader(""), t.TempDir(), "1-1"); got != (Stats{}) {
		t.Errorf("nothing counts %+v", got)
	}
}
