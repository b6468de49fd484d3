;;; SPDX-License-Identifier: GPL-3.0-or-later
;;;
;;; Extension of GNU Guix that has "guix substitute" done by
;;; guix-substitute-eris.  Put this file, under the name substitute.scm, into a
;;; directory that is called .../guix/extensions, and name that directory in
;;; the variable GUIX_EXTENSIONS_PATH in the environment of guix-daemon.
;;;
;;; If the program cannot be run, the command of Guix itself does the work.

(define-module (guix extensions substitute)
  #:export (guix-substitute))

(define %program
  ;; An absolute file name, for the daemon's helpers have no useful PATH.
  (or (getenv "GUIX_SUBSTITUTE_ERIS")
      "/usr/local/bin/guix-substitute-eris"))

(define (guix-substitute . arguments)
  (catch 'system-error
    (lambda ()
      (apply execl %program "guix-substitute-eris" "substitute" arguments))
    (lambda (key . details)
      (format (current-error-port)
              "guix substitute: warning: cannot run '~a' (~a); using Guix's own command~%"
              %program
              (strerror (system-error-errno (cons key details))))
      (apply (module-ref (resolve-interface '(guix scripts substitute))
                         'guix-substitute)
             arguments))))
