// SPDX-License-Identifier: GPL-3.0-or-later

package acl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// runGuile runs a program in Guile with Guile-Gcrypt, the very binding of Libgcrypt that Guix uses,
// and returns what it prints. It skips the test if they are not installed (on Debian: guile-3.0 and
// guile-gcrypt).
func runGuile(t *testing.T, program string) []string {
	t.Helper()
	guile, err := exec.LookPath("guile")
	if err != nil {
		t.Skip("guile is not installed")
	}
	run := func(program string) ([]byte, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, guile, "--no-auto-compile", "-c", program)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, stderr.String())
		}
		return out, err
	}
	const modules = `(set-port-encoding! (current-output-port) "UTF-8") (use-modules (gcrypt pk-crypto) (gcrypt base16))`
	if _, err := run(modules); err != nil {
		t.Skipf("guile-gcrypt is not installed: %v", err)
	}
	out, err := run(modules + program)
	must(t, err)
	// Numbers that look like text are printed as such; each character stands for a byte.
	text := make([]byte, 0, len(out))
	for _, r := range string(out) {
		text = append(text, byte(r))
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n\n"), "\n\n")
}

// TestLibgcryptVerifies lets Libgcrypt judge signatures, and expects its opinion to be ours.
func TestLibgcryptVerifies(t *testing.T) {
	type sample struct{ name, text string }
	var samples []sample
	add := func(name string, parts ...string) {
		samples = append(samples, sample{name, "(signature " + strings.Join(parts, " ") + ")"})
	}
	digest := digestOf(t, rsaH)
	for i := range 20 {
		field, err := GenerateSigningKey().Sign(digest, "h")
		must(t, err)
		samples = append(samples, sample{fmt.Sprintf("new key %d", i), decodeField(t, field)})
	}
	field, err := signingKey(t, read(t, "testdata/rsa.sec"), "").Sign(digest, "h")
	must(t, err)
	samples = append(samples, sample{"RSA", decodeField(t, field)})

	n := "1000000000000000000000000000000014DEF9DEA2F79CD65812631A5CF5D3ED"
	add("ECDSA", eccData, eccVal, eccKey)
	add("RSA by Libgcrypt", rsaData, rsaVal, rsaKey)
	add("RSA modulus without leading zero", rsaData, rsaVal, strings.Replace(rsaKey, "#00DC", "#DC", 1))
	add("RSA, wrong", rsaData, strings.Replace(rsaVal, "#8B", "#8A", 1), rsaKey)
	add("RSA, raw", strings.Replace(rsaData, "pkcs1", "raw", 1), rsaVal, rsaKey)
	add("flag raw", strings.Replace(eccData, "rfc6979", "raw", 1), eccVal, eccKey)
	add("flag eddsa", strings.Replace(eccData, "rfc6979", "eddsa", 1), eccVal, eccKey)
	add("flag pkcs1", rsaData, eccVal, eccKey)
	add("r = n", eccData, strings.Replace(eccVal, eccR, n, 1), eccKey)
	add("s = n", eccData, strings.Replace(eccVal, eccS, n, 1), eccKey)
	add("r = 0", eccData, strings.Replace(eccVal, eccR, "00", 1), eccKey)
	add("r = s", eccData, strings.Replace(eccVal, eccR, eccS, 1), eccKey)
	add("leading zeros", eccData, strings.Replace(eccVal, "#07", "#000000000007", 1), eccKey)
	add("40 bytes", eccData, strings.Replace(eccVal, "#07", "#01000000000007", 1), eccKey)
	add("33-byte key", eccData, eccVal, strings.Replace(eccKey, eccQ, "40"+eccQ, 1))
	add("opposite key", eccData, eccVal, strings.Replace(eccKey, "5D44#", "5DC4#", 1))

	var program strings.Builder
	for _, s := range samples {
		fmt.Fprintf(&program, `(let ((s (string->canonical-sexp %q)))
  (display (catch 'gcry-error
             (lambda ()
               (if (verify (find-sexp-token s 'sig-val) (find-sexp-token s 'data) (find-sexp-token s 'public-key))
                   "good" "bad"))
             (lambda _ "bad")))
  (display "\n\n"))
`, s.text)
	}
	results := runGuile(t, program.String())
	if len(results) != len(samples) {
		t.Fatalf("%d results for %d samples", len(results), len(samples))
	}
	good := 0
	for i, s := range samples {
		sexp := mustSexp(t, s.text)
		key, _ := sexp.find("public-key")
		a := aclOf(t, key.String())
		err := a.Verify(digest, fieldOf(s.text))
		if err != nil && !errors.Is(err, ErrInvalidSignature) {
			t.Errorf("%s: %v", s.name, err)
		}
		if (err == nil) != (results[i] == "good") {
			t.Errorf("%s: Libgcrypt says it is %s, we say %v", s.name, results[i], err)
		}
		if err == nil {
			good++
		}
	}
	if good < 25 {
		t.Errorf("only %d of %d are good", good, len(samples))
	}
}

// TestLibgcryptSigns compares our signatures with those of Libgcrypt by keys that it makes.
func TestLibgcryptSigns(t *testing.T) {
	results := runGuile(t, `
(define (try key type)
  (do ((i 0 (+ i 1))) ((= i 20))
    (let* ((hash (make-bytevector 32 i))
           (secret (find-sexp-token key 'private-key))
           (data (bytevector->hash-data hash #:key-type type)))
      (display (canonical-sexp->string key))
      (newline)
      (display (canonical-sexp->string data))
      (newline)
      (display (canonical-sexp->string (sign data secret)))
      (newline))))
(use-modules (rnrs bytevectors))
(do ((i 0 (+ i 1))) ((= i 5))
  (try (generate-key (string->canonical-sexp "(genkey (ecdsa (curve Ed25519) (flags rfc6979)))")) 'ecc))
(try (generate-key (string->canonical-sexp "(genkey (rsa (nbits 4:1024)))")) 'rsa)
`)
	if len(results) != 6*20*3 {
		t.Fatalf("%d results", len(results))
	}
	for i := 0; i < len(results); i += 3 {
		k := signingKey(t, results[i], results[i])
		if text := k.SecretText(); !strings.Contains(results[i]+"\n", "private-key") || !mustSexp(t, results[i]).equal(mustSexp(t, "(key-data "+k.PublicKey().Text()+text+")")) {
			t.Errorf("key\n%s\nis read as\n%s", results[i], text)
		}
		field, err := k.Sign([32]byte(bytes.Repeat([]byte{byte(i / 3 % 20)}, 32)), "h")
		must(t, err)
		want := "(signature " + results[i+1] + results[i+2] + k.PublicKey().Text() + ")"
		if got := decodeField(t, field); got != mustSexp(t, want).String() {
			t.Errorf("signed\n%s\nLibgcrypt signed\n%s", got, want)
		}
	}
}
