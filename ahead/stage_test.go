// SPDX-License-Identifier: GPL-3.0-or-later

package ahead

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/testhelp"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/restore"
)

var must = testhelp.Must

// tree makes a tree as items of the store are: not writable.
func tree(t *testing.T, path string) {
	t.Helper()
	must(t, os.Mkdir(path, 0o755))
	must(t, os.WriteFile(filepath.Join(path, "file"), []byte("contents"), 0o444))
	must(t, os.Chmod(path, 0o555))
}

// newStages returns stages of helpers of one session.
func newStages(t *testing.T, n int) (store string, stages []*stage) {
	store = t.TempDir()
	t.Cleanup(func() { restore.Remove(store) })
	for range n {
		s := &stage{store: store, name: "1-2"}
		must(t, s.open())
		stages = append(stages, s)
	}
	return store, stages
}

// put stages an item.
func (s *stage) put(t *testing.T, key string) {
	t.Helper()
	c := s.claim(key)
	if c == nil {
		t.Fatalf("%s cannot be claimed", key)
	}
	defer c.release()
	tree(t, c.part)
	must(t, c.finish())
}

func TestStage(t *testing.T) {
	store, stages := newStages(t, 1)
	s := stages[0]
	must(t, s.open()) // which it is
	a, b := filepath.Join(store, "a"), filepath.Join(store, "b")
	s.put(t, "a")
	s.put(t, "b")
	if s.claim("b") != nil {
		t.Error("an item is staged twice")
	}
	info, err := os.Stat(s.path())
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode of the directory is %v, %v", info.Mode(), err)
	}
	must(t, s.move("a", a))
	info, err = os.Stat(a)
	if err != nil || info.Mode().Perm() != 0o555 {
		t.Errorf("mode of the item is %v, %v", info.Mode(), err)
	}
	if text, err := os.ReadFile(filepath.Join(a, "file")); string(text) != "contents" {
		t.Errorf("contents are %q, %v", text, err)
	}
	if err := s.move("b", a); err == nil {
		t.Error("an item was replaced")
	}
	if err := s.move("a", filepath.Join(store, "c")); err == nil {
		t.Error("an item that is not staged was moved")
	}
	CleanStages(store) // which removes nothing that is in use
	must(t, s.move("b", b))
	if err := s.close(); err != nil || exists(filepath.Join(store, stagingName)) {
		t.Errorf("the directory is left: %v", err)
	}
}

// Two helpers of one daemon process share what they stage.
func TestStageShared(t *testing.T) {
	store, stages := newStages(t, 2)
	one, other := stages[0], stages[1]
	a, b := filepath.Join(store, "a"), filepath.Join(store, "b")
	one.put(t, "a")
	if other.claim("a") != nil {
		t.Error("an item is staged twice")
	}
	must(t, other.move("a", a))
	c := one.claim("b")
	tree(t, c.part)
	if other.claim("b") != nil {
		t.Error("an item is being staged twice")
	}
	if err := other.move("b", b); err == nil {
		t.Error("what is not complete was moved")
	}
	moved := make(chan bool)
	go func() {
		ok, _ := other.take(t.Context(), "b", b)
		moved <- ok
	}()
	must(t, c.finish())
	c.release()
	if !<-moved || !exists(filepath.Join(b, "file")) {
		t.Error("what was waited for is not there")
	}
	ok, mine := other.take(t.Context(), "c", filepath.Join(store, "c"))
	if ok || mine == nil || one.claim("c") != nil {
		t.Error("what nobody stages is not the other's")
	}
	mine.release()
	if err := one.close(); err != nil || !exists(other.path()) {
		t.Errorf("the first takes it from the other: %v", err)
	}
	if err := other.close(); err != nil || exists(filepath.Join(store, stagingName)) {
		t.Errorf("the directory is left: %v", err)
	}
}

// What will not be asked for is removed, but not what another helper has taken.
func TestStageRemove(t *testing.T) {
	store, stages := newStages(t, 2)
	one, other := stages[0], stages[1]
	one.put(t, "a")
	one.put(t, "b")
	must(t, other.move("a", filepath.Join(store, "a")))
	if one.remove("a"); !exists(filepath.Join(store, "a", "file")) {
		t.Error("what another helper has taken was removed")
	}
	one.remove("b")
	entries, err := os.ReadDir(one.path())
	must(t, err)
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".lock" {
			t.Errorf("%s is left", e.Name())
		}
	}
}

// What another helper is staging is waited for as long as whoever asks does.
func TestStageTakeEnds(t *testing.T) {
	store, stages := newStages(t, 2)
	c := stages[0].claim("a")
	defer c.release()
	ctx, cancel := context.WithCancel(t.Context())
	taken := make(chan bool)
	go func() {
		moved, _ := stages[1].take(ctx, "a", filepath.Join(store, "a"))
		taken <- moved
	}()
	cancel()
	if <-taken {
		t.Error("what nobody has completed was taken")
	}
}

// TestCleanStage removes the stage of one session once no helper uses it.
func TestCleanStage(t *testing.T) {
	store, stages := newStages(t, 2)
	another := &stage{store: store, name: "3-4"}
	must(t, another.open())
	stages[0].put(t, "a")
	cleaned := make(chan struct{})
	go func() {
		defer close(cleaned)
		clean(store, stages[0].name, 0)
	}()
	stages[0].lock.Close() // which the end of a process does
	if err := stages[1].move("a", filepath.Join(store, "a")); err != nil {
		t.Errorf("what is in use was removed: %v", err)
	}
	stages[1].lock.Close()
	<-cleaned
	if exists(stages[0].path()) || !exists(another.path()) {
		t.Error("what was left is left, or another session's was removed")
	}
	clean(store, "../1-2", 0) // which there is not
	if err := another.close(); err != nil || exists(filepath.Join(store, stagingName)) {
		t.Errorf("the directory is left: %v", err)
	}
}

// The garbage collector may take it away at any time.
func TestStageCollected(t *testing.T) {
	store, stages := newStages(t, 1)
	s := stages[0]
	a := filepath.Join(store, "a")
	collect := func() {
		t.Helper()
		must(t, restore.Remove(filepath.Join(store, stagingName)))
	}
	c := s.claim("a")
	collect()
	if err := c.finish(); err == nil {
		t.Error("what was collected is complete")
	}
	if s.claim("a") != nil {
		t.Error("what was collected can be staged in")
	}
	if err := s.move("a", a); err == nil {
		t.Error("what was collected was moved")
	}
	must(t, s.open())
	s.put(t, "a")
	collect()
	if err := s.move("a", a); err == nil {
		t.Error("what was collected was moved")
	}
	// Nor is what was moved complete, if the stage was collected meanwhile.
	must(t, s.open())
	s.put(t, "a")
	d, err := os.Open(s.path())
	must(t, err)
	defer d.Close()
	collect()
	must(t, s.open())
	s.put(t, "a")
	if err := s.moveFrom(d, "a", a); err == nil || exists(a) {
		t.Errorf("what may have been collected is complete (%v), or left", err)
	}
	must(t, s.close())
}

// What helpers leave that were killed is removed by the next one.
func TestCleanStages(t *testing.T) {
	store, stages := newStages(t, 1)
	used, killed := stages[0], &stage{store: store, name: "3-4"}
	must(t, killed.open())
	a := filepath.Join(store, "a")
	used.put(t, "a")
	killed.put(t, "a")
	tree(t, killed.claim("b").part)
	killed.lock.Close() // which the end of a process does
	CleanStages(store)
	if exists(killed.path()) {
		t.Error("what was left is left")
	}
	must(t, used.move("a", a))
	must(t, used.close())
	// A link is not followed.
	target := filepath.Join(store, "target")
	tree(t, target)
	must(t, os.Mkdir(filepath.Join(store, stagingName), 0o700))
	must(t, os.Symlink(target, filepath.Join(store, stagingName, "link")))
	CleanStages(store)
	if !exists(filepath.Join(target, "file")) {
		t.Error("a link was followed")
	}
	CleanStages(filepath.Join(store, "none"))
	// Nor one in place of the directory around.
	must(t, restore.Remove(filepath.Join(store, stagingName)))
	must(t, os.MkdirAll(filepath.Join(target+"s", "precious"), 0o755))
	must(t, os.Symlink(target+"s", filepath.Join(store, stagingName)))
	CleanStages(store)
	if !exists(filepath.Join(target+"s", "precious")) {
		t.Error("a link was followed")
	}
}

// Two helpers of one session stage the same item, because the collector has taken away what the
// first one works in: it must neither take the other's for its own nor remove it.
func TestStageMadeAnew(t *testing.T) {
	store, stages := newStages(t, 2)
	first := stages[0].claim("a")
	defer first.release()
	tree(t, first.part)
	must(t, os.Rename(filepath.Join(store, stagingName), filepath.Join(store, "trash")))
	must(t, stages[1].open())
	second := stages[1].claim("a")
	if second == nil {
		t.Fatal("the item cannot be claimed")
	}
	defer second.release()
	must(t, os.Mkdir(second.part, 0o755)) // which is not complete
	if err := first.finish(); err == nil {
		t.Error("what another helper makes was taken for complete")
	}
	// Where a way fails, what it has written is removed, and the next one begins.
	if must(t, restore.Remove(first.part)); !exists(second.part) {
		t.Error("what another helper makes was removed")
	}
	if err := stages[1].move("a", filepath.Join(store, "a")); err == nil {
		t.Error("what is not complete was moved")
	}
}
