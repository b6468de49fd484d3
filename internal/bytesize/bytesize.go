// SPDX-License-Identifier: GPL-3.0-or-later

// Package bytesize reads numbers of bytes, and of bytes per second, as people write them in
// settings: "64K", "1.5MiB", "2M/s". Start with [Parse].
package bytesize

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
)

// maxText bounds the length of what is read.
const maxText = 64

var (
	errForm  = errors.New(`not a number with a unit such as "K", "MiB" or "GB"`)
	errRange = errors.New("too large")
)

// Parse returns the number of bytes that a text stands for: a decimal number, perhaps with a
// fraction, and a unit, perhaps after one space. A letter alone, or followed by "iB", is a power of
// 1024, as wget(1) and curl(1) have it for --limit-rate and Guix for sizes; followed by "B" it is a
// power of 1000. "B" or nothing are bytes. The case of the first letter does not matter. What is
// left of a byte is dropped.
func Parse(text string) (int64, error) {
	n, err := parse(text)
	if err != nil {
		return 0, fmt.Errorf("size %.64q: %w", text, err)
	}
	return n, nil
}

// ParseRate returns the number of bytes per second that a text stands for. It is read as by
// [Parse]; "/s" may follow.
func ParseRate(text string) (int64, error) {
	n, err := parse(strings.TrimSuffix(text, "/s"))
	if err != nil {
		return 0, fmt.Errorf("rate %.64q: %w", text, err)
	}
	return n, nil
}

// Set returns what sets n to what [Parse] or [ParseRate] returns, for options.
func Set(n *int64, parse func(text string) (int64, error)) func(text string) error {
	return func(text string) (err error) { *n, err = parse(text); return err }
}

func parse(text string) (int64, error) {
	m := regexp.MustCompile(`^([0-9]+)(\.[0-9]+)? ?(?:B|([KMGTPEkmgtpe])(B|iB)?)?$`).FindStringSubmatch(text)
	if m == nil || len(text) > maxText {
		return 0, errForm
	}
	whole, fraction, prefix, unit := m[1], m[2], m[3], m[4]
	base, factor := int64(1024), int64(1)
	if unit == "B" {
		base = 1000
	}
	if prefix != "" {
		for range 1 + strings.Index("KMGTPE", strings.ToUpper(prefix)) {
			factor *= base
		}
	}
	if fraction == "" {
		n, err := strconv.ParseInt(whole, 10, 64)
		if err != nil || n > math.MaxInt64/factor {
			return 0, errRange
		}
		return n * factor, nil
	}
	f, err := strconv.ParseFloat(whole+fraction, 64)
	f *= float64(factor)
	if err != nil || f >= math.MaxInt64 {
		return 0, errRange
	}
	return int64(f), nil
}
