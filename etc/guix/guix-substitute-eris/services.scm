;;; SPDX-License-Identifier: GPL-3.0-or-later
;;;
;;; Services of Guix System: guix-daemon with guix-substitute-eris as its helper,
;;; a block store, and a publisher.  Put the directory etc/guix on the load path
;;; ("guix system -L etc/guix"), and in the configuration of the system:
;;;
;;;   (use-modules (guix-substitute-eris services))
;;;   ...
;;;   (services
;;;    (cons* (service substitute-eris-service-type
;;;                    (substitute-eris-configuration
;;;                     (substitute-urls '("http://lan.example:8080"))
;;;                     (authorized-keys (list (local-file "lan.example.pub")))
;;;                     (stores '("coap+tcp://lan.example"))))
;;;           (service eris-block-store-service-type)
;;;           (service eris-publish-service-type)
;;;           (modify-services %base-services
;;;             (guix-service-type config => (with-substitute-eris config)))))
;;;
;;; Who may write to the socket of the block store may put blocks, and who may
;;; connect may get them: root, and the members of the group "eris-block-store".
;;; A guix-daemon that does not run as root (privileged? #f) is none of them.  For
;;; its sake, have the block store listen where everybody may get blocks, and name
;;; that in the first service:
;;;
;;;   (eris-block-store-configuration
;;;    (listen '("coap+unix:///run/guix-substitute-eris/get.sock?get")))

(define-module (guix-substitute-eris services)
  #:use-module (gnu packages admin)
  #:use-module (gnu services)
  #:use-module (gnu services base)
  #:use-module (gnu services shepherd)
  #:use-module (gnu system shadow)
  #:use-module (guix gexp)
  #:use-module (guix records)
  #:use-module (guix-substitute-eris package)
  #:use-module (srfi srfi-1)
  #:export (with-substitute-eris

            substitute-eris-configuration
            substitute-eris-configuration?
            substitute-eris-configuration-substitute-urls
            substitute-eris-configuration-authorized-keys
            substitute-eris-configuration-package
            substitute-eris-configuration-stores
            substitute-eris-configuration-extra-content
            substitute-eris-service-type

            eris-block-store-configuration
            eris-block-store-configuration?
            eris-block-store-configuration-program
            eris-block-store-configuration-directory
            eris-block-store-configuration-socket
            eris-block-store-configuration-listen
            eris-block-store-configuration-upstreams
            eris-block-store-configuration-max-size
            eris-block-store-configuration-limit-rate
            eris-block-store-configuration-log-file
            eris-block-store-service-type

            eris-publish-configuration
            eris-publish-configuration?
            eris-publish-configuration-program
            eris-publish-configuration-listen
            eris-publish-configuration-store
            eris-publish-configuration-announce
            eris-publish-configuration-cache
            eris-publish-configuration-extra-options
            eris-publish-configuration-log-file
            eris-publish-service-type))

(define %program
  (file-append guix-substitute-eris "/bin/guix-substitute-eris"))

(define %account "eris-block-store")

(define %socket "/run/guix-substitute-eris/eris.sock")

(define (options name values)
  "Return the options --NAME=VALUE for each of VALUES that is not #f."
  (filter-map (lambda (value)
                (and value (string-append "--" name "=" value)))
              values))

(define (shepherd-program name documentation requirement user command log-file)
  "Return the Shepherd service NAME, which runs COMMAND, a gexp of a list, as
USER; #f means that it begins as root."
  (shepherd-service
   (documentation documentation)
   (provision (list name))
   (requirement requirement)
   (start #~(make-forkexec-constructor
             #$command
             #:user #$user
             #:group #$user
             #:log-file #$log-file
             #:resource-limits '((nofile 16384 16384))))
   ;; The servers end within some seconds, after what was under way.
   (stop #~(make-kill-destructor))))

(define (accounts user comment groups)
  (list (user-group
         (name user)
         (system? #t))
        (user-account
         (name user)
         (group user)
         (supplementary-groups groups)
         (system? #t)
         (comment comment)
         (home-directory "/var/empty")
         (shell (file-append shadow "/sbin/nologin")))))

(define (own-directories user directories modes)
  "Return a gexp that makes DIRECTORIES for USER, with MODES."
  #~(begin
      (use-modules (guix build utils) (ice-9 ftw))
      (let* ((user (getpwnam #$user))
             (uid (passwd:uid user))
             (gid (passwd:gid user)))
        ;; An account that was taken away and comes back may have other
        ;; numbers: what was of the former one is of the new one.  Somebody may
        ;; have the former number and make links meanwhile, so nothing is named
        ;; but in a directory that is open.
        (define (give directory former)
          (for-each
           (lambda (name)
             (let ((status (statat directory name AT_SYMLINK_NOFOLLOW)))
               (when (= former (stat:uid status))
                 (when (eq? 'directory (stat:type status))
                   (call-with-port
                    (openat directory name
                            (logior O_RDONLY O_DIRECTORY O_NOFOLLOW))
                    (lambda (port) (give port former))))
                 (chown-at directory name uid gid AT_SYMLINK_NOFOLLOW))))
           (scandir (string-append "/proc/self/fd/"
                                   (number->string (fileno directory)))
                    (lambda (name) (not (member name '("." "..")))))))
        (for-each
         (lambda (directory mode)
           (mkdir-p directory)
           (let ((former (stat:uid (stat directory))))
             (unless (memv former (list 0 uid))
               (call-with-port (open directory (logior O_RDONLY O_DIRECTORY))
                 (lambda (port) (give port former)))))
           (chown directory uid gid)
           (chmod directory mode))
         '#$directories '#$modes))))


;;;
;;; The helper of guix-daemon.
;;;

(define (with-substitute-eris config)
  "Return CONFIG, a <guix-configuration>, with guix-daemon looking for
extensions of Guix where substitute-eris-service-type puts the one that runs the
program."
  (guix-configuration
   (inherit config)
   ;; Strings only: the daemon's service quotes them.
   (environment (cons "GUIX_EXTENSIONS_PATH=/etc/guix/extensions"
                      (guix-configuration-environment config)))))

(define-record-type* <substitute-eris-configuration>
  substitute-eris-configuration make-substitute-eris-configuration
  substitute-eris-configuration?
  ;; Substitute servers that are asked before others, and their keys, which are
  ;; file-like objects.
  (substitute-urls substitute-eris-configuration-substitute-urls
                   (default '()))
  (authorized-keys substitute-eris-configuration-authorized-keys
                   (default '()))
  ;; The package of the program.
  (package         substitute-eris-configuration-package
                   (default guix-substitute-eris))
  ;; URLs of block stores.
  (stores          substitute-eris-configuration-stores
                   (default (list (string-append "coap+unix://" %socket))))
  ;; Further lines of the configuration file substitute-eris.toml.
  (extra-content   substitute-eris-configuration-extra-content
                   (default "")))

(define (substitute-eris-guix-extension config)
  (guix-extension
   (substitute-urls (substitute-eris-configuration-substitute-urls config))
   (authorized-keys (substitute-eris-configuration-authorized-keys config))))

(define (substitute-eris-files config)
  `(("/etc/guix/extensions/substitute.scm"
     ,(file-append (substitute-eris-configuration-package config)
                   "/share/guix/extensions/substitute.scm"))
    ("/etc/guix/substitute-eris.toml"
     ,(plain-file
       "substitute-eris.toml"
       (string-append
        "eris-stores = ["
        (string-join (map object->string
                          (substitute-eris-configuration-stores config))
                     ", ")
        "]\n"
        (substitute-eris-configuration-extra-content config))))))

(define substitute-eris-service-type
  (service-type
   (name 'substitute-eris)
   (description "Tell @command{guix-substitute-eris} where blocks are, and
@command{guix-daemon} which servers and keys count.  For the daemon to use the
program, its configuration must go through @code{with-substitute-eris}.")
   (extensions
    (list (service-extension guix-service-type
                             substitute-eris-guix-extension)
          ;; For those who look for faults: "doctor", "explain".
          (service-extension profile-service-type
                             (compose list
                                      substitute-eris-configuration-package))
          (service-extension special-files-service-type
                             substitute-eris-files)))
   (default-value (substitute-eris-configuration))))


;;;
;;; The block store.
;;;

(define-record-type* <eris-block-store-configuration>
  eris-block-store-configuration make-eris-block-store-configuration
  eris-block-store-configuration?
  ;; File name of the program, or something that is lowered to one.
  (program    eris-block-store-configuration-program
              (default %program))
  ;; Where the blocks are kept.
  (directory  eris-block-store-configuration-directory
              (default "/var/cache/guix-substitute-eris/blocks"))
  ;; The Unix socket; its directory is made.
  (socket     eris-block-store-configuration-socket
              (default %socket))
  ;; URLs of what else to listen on, with what is permitted there.
  (listen     eris-block-store-configuration-listen
              (default '()))
  ;; URLs of stores that have what this one has not.
  (upstreams  eris-block-store-configuration-upstreams
              (default '()))
  ;; The most bytes of blocks, as a string like "50GiB", or #f for no limit.
  (max-size   eris-block-store-configuration-max-size
              (default #f))
  ;; Bytes that are sent per second, like "2MiB", or #f for no limit.
  (limit-rate eris-block-store-configuration-limit-rate
              (default #f))
  (log-file   eris-block-store-configuration-log-file
              (default "/var/log/eris-block-store.log")))

(define (eris-block-store-accounts config)
  (accounts %account "ERIS block store" '()))

(define (eris-block-store-activation config)
  (own-directories %account
                   (list (eris-block-store-configuration-directory config)
                         (dirname (eris-block-store-configuration-socket
                                   config)))
                   '(#o700 #o755)))

(define (uses-network? config)
  "Whether the block store of CONFIG serves others than programs of this
machine, or asks others."
  (any (lambda (url) (not (string-prefix? "coap+unix:" url)))
       (append (eris-block-store-configuration-listen config)
               (eris-block-store-configuration-upstreams config))))

(define (eris-block-store-shepherd-services config)
  (list (shepherd-program
         'eris-block-store "Keep ERIS blocks and serve them."
         `(user-processes loopback
                          ,@(if (uses-network? config) '(networking) '()))
         %account
         #~(list #$(eris-block-store-configuration-program config)
                 "serve"
                 #$@(append
                     (options "directory"
                              (list (eris-block-store-configuration-directory
                                     config)))
                     (options "socket"
                              (list (eris-block-store-configuration-socket
                                     config)))
                     (options "max-size"
                              (list (eris-block-store-configuration-max-size
                                     config)))
                     (options "limit-rate"
                              (list (eris-block-store-configuration-limit-rate
                                     config)))
                     (options "upstream"
                              (eris-block-store-configuration-upstreams config))
                     (options "listen"
                              (eris-block-store-configuration-listen config))))
         (eris-block-store-configuration-log-file config))))

(define eris-block-store-service-type
  (service-type
   (name 'eris-block-store)
   (description "Run the block store of @command{guix-substitute-eris}, which
keeps ERIS blocks and serves them by CoAP and HTTP.")
   (extensions
    (list (service-extension account-service-type
                             eris-block-store-accounts)
          (service-extension activation-service-type
                             eris-block-store-activation)
          (service-extension shepherd-root-service-type
                             eris-block-store-shepherd-services)))
   (default-value (eris-block-store-configuration))))


;;;
;;; The publisher.
;;;

(define-record-type* <eris-publish-configuration>
  eris-publish-configuration make-eris-publish-configuration
  eris-publish-configuration?
  ;; File name of the program, or something that is lowered to one.
  (program       eris-publish-configuration-program
                 (default %program))
  ;; Host and port to listen on.
  (listen        eris-publish-configuration-listen
                 (default ":8080"))
  ;; URL of the store that blocks are put into.
  (store         eris-publish-configuration-store
                 (default (string-append "coap+unix://" %socket)))
  ;; URLs of stores that clients are told of, separated by spaces, or #f.
  (announce      eris-publish-configuration-announce
                 (default #f))
  ;; Where read capabilities and compressed nars are kept.
  (cache         eris-publish-configuration-cache
                 (default "/var/cache/guix-substitute-eris-publish"))
  (extra-options eris-publish-configuration-extra-options
                 (default '()))
  (log-file      eris-publish-configuration-log-file
                 (default "/var/log/eris-publish.log")))

(define %publisher "eris-publish")

(define (eris-publish-accounts config)
  (accounts %publisher "ERIS publisher" (list %account)))

(define (eris-publish-activation config)
  (own-directories %publisher
                   (list (eris-publish-configuration-cache config))
                   '(#o700)))

(define (eris-publish-shepherd-services config)
  (list (shepherd-program
         'eris-publish "Publish store items, with ERIS read capabilities."
         '(user-processes loopback networking guix-daemon)
         #f ;it reads the private key of Guix before it is that user
         #~(list #$(eris-publish-configuration-program config)
                 "publish"
                 #$@(append
                     (options "listen"
                              (list (eris-publish-configuration-listen config)))
                     (options "user" (list %publisher))
                     (options "store"
                              (list (eris-publish-configuration-store config)))
                     (options "announce"
                              (list (eris-publish-configuration-announce
                                     config)))
                     (options "cache"
                              (list (eris-publish-configuration-cache config)))
                     (eris-publish-configuration-extra-options config)))
         (eris-publish-configuration-log-file config))))

(define eris-publish-service-type
  (service-type
   (name 'eris-publish)
   (description "Run @command{guix-substitute-eris publish}, which serves the
items of the store, signed by the key of the machine, with read capabilities of
blocks that it puts into the store of @code{eris-block-store-service-type}.")
   (extensions
    (list (service-extension account-service-type
                             eris-publish-accounts)
          (service-extension activation-service-type
                             eris-publish-activation)
          (service-extension shepherd-root-service-type
                             eris-publish-shepherd-services)))
   (default-value (eris-publish-configuration))))
