# SPDX-License-Identifier: GPL-3.0-or-later
# What is not a plain go command; see README.md and docs/performance.md.

.PHONY: bench

# Whole-process benchmarks; BENCH has options, see "go run ./internal/bench -help".
bench:
	go run ./internal/bench -write docs/performance.md $(BENCH)
