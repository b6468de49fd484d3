// SPDX-License-Identifier: GPL-3.0-or-later

package settings

import (
	"os"
	"strings"
	"testing"
)

// TestDocumented looks whether the document about the configuration has each setting.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range settingNames() {
		if !strings.Contains(string(text), "\n    "+name+" = ") {
			t.Errorf("docs/configuration.md does not have %q", name)
		}
	}
}
