// SPDX-License-Identifier: GPL-3.0-or-later

// Package bytesize reads numbers of bytes, and of bytes per second, as people write them in
// settings: "64K", "1.5MiB", "2M/s". Start with [Parse].
package bytesize

import (
	"errors"
	"fmt"
	"math"
	"math/big"
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
	number := strings.TrimRight(text, "KMGTPEkmgtpeiB ")
	factor, known := multiplier(strings.TrimPrefix(text[len(number):], " "))
	if !known || len(text) > maxText || strings.Trim(number, "0123456789.") != "" || strings.Trim(number, ".") != number {
		return 0, errForm
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, errForm
	}
	r.Mul(r, new(big.Rat).SetInt64(factor))
	n := new(big.Int).Quo(r.Num(), r.Denom())
	if !n.IsInt64() {
		return 0, errRange
	}
	return n.Int64(), nil
}

// multiplier returns how many bytes a unit stands for.
func multiplier(unit string) (factor int64, known bool) {
	if unit == "" || unit == "B" {
		return 1, true
	}
	power := strings.IndexByte(" KMGTPE", strings.ToUpper(unit[:1])[0])
	switch unit[1:] {
	case "", "iB":
		factor = 1 << (10 * max(0, power))
	case "B":
		factor = int64(math.Pow10(3 * power))
	}
	return factor, power > 0 && factor > 0
}
