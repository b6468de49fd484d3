# SPDX-License-Identifier: GPL-3.0-or-later
# "make" builds, "make check" tests, "make install" installs below DESTDIR; "make dist" makes a
# source archive that needs nothing but Go; "make bench" measures, "make soak" tests with many faults
# and kills.

PREFIX = /usr/local
SYSCONFDIR = /etc
GO = go
name = guix-substitute-eris
bin = $(DESTDIR)$(PREFIX)/bin
units = $(DESTDIR)$(PREFIX)/lib/systemd/system
# The name must end in /guix/extensions.
EXTENSIONS = $(SYSCONFDIR)/guix/extensions
extensions = $(DESTDIR)$(EXTENSIONS)
share = $(DESTDIR)$(PREFIX)/share
lib = $(DESTDIR)$(PREFIX)/lib
version = $(shell sed -n 's/^const release = "\(.*\)"$$/\1/p' internal/program/version.go)

.PHONY: all check soak install uninstall dist bench clean

all: $(name)

# "sudo make install" builds nothing that "make" has built: root may have no Go.
$(name): go.mod go.sum $(shell find */ -type f ! -path '*/testdata/*' ! -path 'bench/*' ! -path 'docs/*' ! -name '*_test.go')
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags=-s -o $@ ./cmd/$(name)

check:
	$(GO) test ./...

# Five minutes and more: schedules of faults, how often a helper, a block store and a publisher are
# killed, and how many pages of a full disk there are between two attempts (as root). SOAK=0, KILLS=0
# and FULL=0 leave one of them out.
SOAK = 1000
KILLS = 500
FULL = 1
soak:
	ERIS_SOAK=$(SOAK) ERIS_KILLS=$(KILLS) ERIS_FULL=$(FULL) nice $(GO) test -count=1 -timeout 1h -parallel 8 \
		-run '^Test(Soak|HelperKilled|ServeKilled|PublishKilled|FullDisks)$$' ./cmd/$(name)

# Texts name the program where it is installed.
place = sed 's|/usr/local/|$(PREFIX)/|g' $(1) | install -m 644 /dev/stdin "$(2)/$(notdir $(1))"

unit_files = $(wildcard etc/systemd/$(name)*.*)
guix_files = $(wildcard etc/guix/$(name)/*.scm)

# What guix-daemon does, "setup" changes; this only puts files where they are found.
install: $(name)
	install -d "$(bin)" "$(units)" "$(lib)/sysusers.d" "$(lib)/tmpfiles.d" "$(extensions)" "$(share)/$(name)/guix/$(name)" "$(share)/doc/$(name)" \
		"$(share)/bash-completion/completions" "$(share)/zsh/site-functions" "$(share)/fish/vendor_completions.d"
	install -m 755 $(name) "$(bin)/"
	umask 022; env -i ./$(name) man "$(share)/man"
	umask 022; ./$(name) completion bash > "$(share)/bash-completion/completions/$(name)"
	umask 022; ./$(name) completion zsh > "$(share)/zsh/site-functions/_$(name)"
	umask 022; ./$(name) completion fish > "$(share)/fish/vendor_completions.d/$(name).fish"
	set -e; $(foreach f,$(unit_files),$(call place,$(f),$(units));)
	$(call place,etc/daemon/guix/extensions/substitute.scm,$(extensions))
	install -m 644 $(guix_files) "$(share)/$(name)/guix/$(name)/"
	install -m 644 etc/sysusers.d/$(name).conf "$(lib)/sysusers.d/"
	install -m 644 etc/tmpfiles.d/$(name).conf "$(lib)/tmpfiles.d/"
	$(call place,etc/systemd/guix-daemon.service.d/$(name).conf,$(share)/$(name))
	$(call place,etc/apparmor.d/$(name),$(share)/$(name))
	install -m 644 README.md CHANGELOG.md docs/*.md "$(share)/doc/$(name)/"

uninstall:
	@if [ -e "$(DESTDIR)/etc/systemd/system/guix-daemon.service.d/$(name).conf" ]; then \
		echo 'guix-daemon would start what is not there: run "guix-substitute-eris setup --undo" first' >&2; exit 1; fi
	rm -f "$(bin)/$(name)" $(foreach f,$(notdir $(unit_files)),"$(units)/$(f)") "$(extensions)/substitute.scm"
	rm -f "$(lib)/sysusers.d/$(name).conf" "$(lib)/tmpfiles.d/$(name).conf"
	rm -rf "$(share)/$(name)" "$(share)/doc/$(name)" "$(share)/man/man1/$(name)"*.1 "$(share)/man/man5/substitute-eris.toml.5"
	rm -f "$(share)/bash-completion/completions/$(name)" "$(share)/zsh/site-functions/_$(name)" \
		"$(share)/fish/vendor_completions.d/$(name).fish"

# The same bytes wherever and whenever it is made of a commit: no times, owners or modes of files go
# in.
stem = $(name)-$(version)
dist:
	rm -rf .dist && mkdir .dist
	git archive --prefix=$(stem)/ HEAD | tar -x -C .dist
	cd .dist/$(stem) && $(GO) mod vendor
	tar -c -C .dist --format=ustar --sort=name --mtime=@$$(git log -1 --format=%ct) --owner=0 --group=0 --numeric-owner \
		--mode=u=rwX,go=rX $(stem) | gzip -9n >$(stem).tar.gz.new
	mv $(stem).tar.gz.new $(stem).tar.gz
	rm -rf .dist

# Whole-process benchmarks; BENCH has options, see "go run . -help" in the directory bench.
bench:
	cd bench && $(GO) run . -write ../docs/performance.md $(BENCH)

clean:
	rm -rf $(name) $(name)-*.tar.gz .dist
