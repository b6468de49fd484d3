;;; SPDX-License-Identifier: GPL-3.0-or-later
;;;
;;; The package of guix-substitute-eris, built from the source archive that
;;; "make dist" makes, which has all that is needed but Go:
;;;
;;;   make dist
;;;   guix build -L etc/guix guix-substitute-eris

(define-module (guix-substitute-eris package)
  #:use-module (gnu packages golang)
  #:use-module (guix build-system gnu)
  #:use-module (guix gexp)
  #:use-module ((guix licenses) #:prefix license:)
  #:use-module (guix packages)
  #:export (guix-substitute-eris))

(define guix-substitute-eris
  (package
    (name "guix-substitute-eris")
    (version "0.1.0")
    ;; The archive that "make dist" leaves at the top of the sources.  Only a
    ;; literal name is relative to this file.
    (source
     (local-file "../../../guix-substitute-eris-0.1.0.tar.gz"))
    (build-system gnu-build-system)
    (arguments
     (list
      #:make-flags
      #~(list (string-append "PREFIX=" #$output)
              (string-append "SYSCONFDIR=" #$output "/etc")
              (string-append "EXTENSIONS=" #$output "/share/guix/extensions"))
      #:test-target "check"
      #:phases
      #~(modify-phases %standard-phases
          (delete 'configure)
          (add-before 'build 'set-environment
            (lambda _
              (setenv "HOME" (getcwd))
              (setenv "GOCACHE" (string-append (getcwd) "/.cache"))
              (setenv "GOFLAGS" "-mod=vendor -buildvcs=false")
              (setenv "GOTOOLCHAIN" "local")
              ;; Scripts that tests write.
              (substitute* (append (find-files "cmd" "\\.(go|txt)$")
                                   (find-files "internal/setup" "\\.go$"))
                (("#!/bin/sh") (string-append "#!" (which "sh")))))))))
    (native-inputs (list go-1.26))
    (home-page
     "https://codeberg.org/guix-substitute-eris/guix-substitute-eris")
    (synopsis "Substitutes for Guix from ERIS blocks")
    (description
     "This program takes the place of @command{guix substitute}, the helper
that @command{guix-daemon} starts to find and fetch substitutes.  It restores
store items from blocks of the Encoding for Robust Immutable Storage (ERIS),
which come from any number of stores at once, or from ordinary nars.  It also
keeps and serves blocks, and publishes store items.")
    (license license:gpl3+)))

;; For "guix build -f" and "guix package -f".
guix-substitute-eris
