# SPDX-License-Identifier: GPL-3.0-or-later
# "make" builds, "make check" tests, "make install" installs below DESTDIR; "make bench" measures,
# "make soak" tests with many faults and kills.

PREFIX = /usr/local
SYSCONFDIR = /etc
GO = go
name = guix-substitute-eris
bin = $(DESTDIR)$(PREFIX)/bin
units = $(DESTDIR)$(PREFIX)/lib/systemd/system
extensions = $(DESTDIR)$(SYSCONFDIR)/guix/extensions
share = $(DESTDIR)$(PREFIX)/share
completions = $(share)/bash-completion/completions $(share)/zsh/site-functions $(share)/fish/vendor_completions.d

.PHONY: all check soak install uninstall bench clean $(name)

all: $(name)

# Go knows what has to be built again.
$(name):
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags=-s -o $@ ./cmd/$(name)

check:
	$(GO) test ./...

# A quarter of an hour: schedules of faults, how often a helper, a block store and a publisher are
# killed, and how many pages of a full disk there are between two attempts (as root). SOAK=0 and
# KILLS=0 leave one of them out.
SOAK = 1000
KILLS = 500
FULL = 1
soak:
	ERIS_SOAK=$(SOAK) ERIS_KILLS=$(KILLS) ERIS_FULL=$(FULL) nice $(GO) test -count=1 -timeout 1h -parallel 8 \
		-run '^Test(Soak|HelperKilled|ServeKilled|PublishKilled|FullDisks)$$' ./cmd/$(name)

# Texts name the program where it is installed.
place = sed 's|/usr/local/|$(PREFIX)/|g' $(1) | install -m 644 /dev/stdin $(2)/$(notdir $(1))

install: $(name)
	install -d $(bin) $(units) $(extensions) $(share)/$(name)/services $(share)/doc/$(name) $(completions)
	install -m 755 $(name) $(bin)/
	env -i ./$(name) man $(share)/man
	./$(name) completion bash > $(share)/bash-completion/completions/$(name)
	./$(name) completion zsh > $(share)/zsh/site-functions/_$(name)
	./$(name) completion fish > $(share)/fish/vendor_completions.d/$(name).fish
	$(call place,etc/systemd/$(name).service,$(units))
	$(call place,etc/systemd/$(name).socket,$(units))
	$(call place,etc/guix/extensions/substitute.scm,$(extensions))
	$(call place,etc/guix/services/eris-block-store.scm,$(share)/$(name)/services)
	install -m 644 README.md CHANGELOG.md docs/*.md $(share)/doc/$(name)/

uninstall:
	rm -f $(bin)/$(name) $(units)/$(name).service $(units)/$(name).socket $(extensions)/substitute.scm
	rm -rf $(share)/$(name) $(share)/doc/$(name) $(share)/man/man1/$(name)*.1 $(share)/man/man5/substitute-eris.toml.5
	rm -f $(share)/bash-completion/completions/$(name) $(share)/zsh/site-functions/_$(name) \
		$(share)/fish/vendor_completions.d/$(name).fish

# Whole-process benchmarks; BENCH has options, see "go run . -help" in the directory bench.
bench:
	cd bench && $(GO) run . -write ../docs/performance.md $(BENCH)

clean:
	rm -f $(name)
