// SPDX-License-Identifier: GPL-3.0-or-later

package bytesize_test

import (
	"math"
	"strings"
	"testing"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/bytesize"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]int64{
		"0":                   0,
		"1":                   1,
		"512B":                512,
		"500K":                500 << 10,
		"500k":                500 << 10,
		"500KiB":              500 << 10,
		"500kiB":              500 << 10,
		"500kB":               500_000,
		"500KB":               500_000,
		"2M":                  2 << 20,
		"2m":                  2 << 20,
		"2 MiB":               2 << 20,
		"1.5MiB":              3 << 19,
		"1.5 MB":              1_500_000,
		"0.0001":              0,
		"10G":                 10 << 30,
		"1T":                  1 << 40,
		"1P":                  1 << 50,
		"7E":                  7 << 60,
		"9EB":                 9_000_000_000_000_000_000,
		"9223372036854775807": math.MaxInt64,
	} {
		if got, err := bytesize.Parse(text); err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", text, got, err, want)
		}
		if got, err := bytesize.ParseRate(text + "/s"); err != nil || got != want {
			t.Errorf("ParseRate(%q) = %d, %v; want %d", text+"/s", got, err, want)
		}
		if got, err := bytesize.ParseRate(text); err != nil || got != want {
			t.Errorf("ParseRate(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", " ", "K", "MiB", "-1", "+1", "1e3", "0x10", "1 000", "1,5M", ".5M", "5.M", "1.2.3", "1..2", "1  M", " 1M", "1M ",
		"1Mi", "1Mib", "1MIB", "1Ki B", "1b", "1Z", "1Q", "1é", "1Bi", "1/s", "NaN", "Inf", "1M/s/s", "1_000", "٣",
		"8E", "9223372036854775808", "10EB", "9223372036854775808.5", "99999999999999999999", "9.5E",
		strings.Repeat("0", 65),
	} {
		if got, err := bytesize.Parse(text); err == nil {
			t.Errorf("Parse(%q) = %d", text, got)
		} else if !strings.Contains(err.Error(), "size ") {
			t.Errorf("Parse(%q): %v", text, err)
		}
	}
	if got, err := bytesize.ParseRate("1/h"); err == nil || !strings.Contains(err.Error(), "rate ") {
		t.Errorf("ParseRate: %d, %v", got, err)
	}
}
