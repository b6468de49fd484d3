;;; SPDX-License-Identifier: GPL-3.0-or-later
;;;
;;; A Guix System service that runs the block store of guix-substitute-eris.
;;; Put this directory's parent on the load path ("guix system -L etc/guix"), and
;;; in the configuration of the system:
;;;
;;;   (use-modules (services eris-block-store))
;;;   ...
;;;   (services
;;;    (cons (service eris-block-store-service-type
;;;                   (eris-block-store-configuration
;;;                    (max-size "50GiB")
;;;                    (listen '("coap+tcp://[::]:5683"))))
;;;          %base-services))
;;;
;;; Who may write to the socket may put blocks: the members of the group
;;; "eris-block-store" and root.  Everybody who may connect may get them.

(define-module (services eris-block-store)
  #:use-module (gnu packages admin)
  #:use-module (gnu services)
  #:use-module (gnu services shepherd)
  #:use-module (gnu system shadow)
  #:use-module (guix gexp)
  #:use-module (guix records)
  #:export (eris-block-store-configuration
            eris-block-store-configuration?
            eris-block-store-configuration-program
            eris-block-store-configuration-directory
            eris-block-store-configuration-socket
            eris-block-store-configuration-listen
            eris-block-store-configuration-max-size
            eris-block-store-configuration-limit-rate
            eris-block-store-configuration-log-file
            eris-block-store-service-type))

(define-record-type* <eris-block-store-configuration>
  eris-block-store-configuration make-eris-block-store-configuration
  eris-block-store-configuration?
  ;; File name of the program, or something that is lowered to one.
  (program    eris-block-store-configuration-program
              (default "/usr/local/bin/guix-substitute-eris"))
  ;; Where the blocks are kept.
  (directory  eris-block-store-configuration-directory
              (default "/var/cache/guix-substitute-eris/blocks"))
  ;; The Unix socket; its directory is made.
  (socket     eris-block-store-configuration-socket
              (default "/run/guix-substitute-eris/eris.sock"))
  ;; URLs of what else to listen on, with what is permitted there.
  (listen     eris-block-store-configuration-listen
              (default '()))
  ;; The most bytes of blocks, as a string like "50GiB", or #f for no limit.
  (max-size   eris-block-store-configuration-max-size
              (default #f))
  ;; Bytes per second in each direction, like "2MiB", or #f for no limit.
  (limit-rate eris-block-store-configuration-limit-rate
              (default #f))
  (log-file   eris-block-store-configuration-log-file
              (default "/var/log/eris-block-store.log")))

(define %account "eris-block-store")

(define (eris-block-store-accounts config)
  (list (user-group
         (name %account)
         (system? #t))
        (user-account
         (name %account)
         (group %account)
         (system? #t)
         (comment "ERIS block store")
         (home-directory "/var/empty")
         (shell (file-append shadow "/sbin/nologin")))))

(define (eris-block-store-activation config)
  (let ((directory (eris-block-store-configuration-directory config))
        (socket (eris-block-store-configuration-socket config)))
    #~(begin
        (use-modules (guix build utils))
        (define user (getpwnam #$%account))
        (define (provide directory mode)
          (mkdir-p directory)
          (chown directory (passwd:uid user) (passwd:gid user))
          (chmod directory mode))
        (provide #$directory #o700)
        (provide (dirname #$socket) #o755))))

(define (eris-block-store-command config)
  (define (option name value)
    (if value
        (list (string-append "--" name "=" value))
        '()))
  #~(list #$(eris-block-store-configuration-program config)
          "serve"
          #$@(append
              (option "directory"
                      (eris-block-store-configuration-directory config))
              (option "socket"
                      (eris-block-store-configuration-socket config))
              (option "max-size"
                      (eris-block-store-configuration-max-size config))
              (option "limit-rate"
                      (eris-block-store-configuration-limit-rate config))
              (map (lambda (url) (string-append "--listen=" url))
                   (eris-block-store-configuration-listen config)))))

(define (eris-block-store-shepherd-services config)
  (list (shepherd-service
         (documentation "Keep ERIS blocks and serve them.")
         (provision '(eris-block-store))
         (requirement '(user-processes loopback networking))
         (start #~(make-forkexec-constructor
                   #$(eris-block-store-command config)
                   #:user #$%account
                   #:group #$%account
                   #:log-file #$(eris-block-store-configuration-log-file config)
                   #:resource-limits '((nofile 16384 16384))))
         ;; The server ends within some seconds, after what was under way.
         (stop #~(make-kill-destructor)))))

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
