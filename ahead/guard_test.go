// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"os"
	"testing"
	"time"
)

// TestMain is a guard, if that is wanted.
func TestMain(m *testing.M) {
	if os.Getenv("AHEAD_TEST_GUARD") != "" {
		CleanAfter(os.Stdin, os.Args[1], os.Args[2])
		return
	}
	os.Exit(m.Run())
}

// Who ends does not wait for another helper of the session that goes on.
func TestDismiss(t *testing.T) {
	t.Setenv("AHEAD_TEST_GUARD", "1")
	store, stages := newStages(t, 1)
	end := (&Session{path: stages[0].name}).Guard(store)
	// If it waited, it would do so until the other one ends.
	other := time.AfterFunc(10*time.Second, func() { stages[0].close() })
	end()
	if !other.Stop() {
		t.Error("who ended has waited for the other one")
	}
	if err := stages[0].close(); err != nil {
		t.Error(err)
	}
}
