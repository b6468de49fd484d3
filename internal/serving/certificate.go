// SPDX-License-Identifier: GPL-3.0-or-later

package serving

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// maxCertificate bounds the file with the certificates and the key, in bytes.
const maxCertificate = 64 << 10

// certificate returns the certificates and the key in a file, which is made if there is none:
// signed by itself, since clients verify blocks. Whoever has a better one puts it there.
func certificate(path string) (tls.Certificate, error) {
	text, err := files.ReadRegular(path, maxCertificate)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = newCertificate(path)
	}
	var c tls.Certificate
	if err == nil {
		c, err = tls.X509KeyPair(text, text)
	}
	if err != nil {
		err = fmt.Errorf("certificate and key in %s: %w", path, err)
	}
	return c, err
}

// newCertificate writes a key and a certificate that never ends (RFC 5280, section 4.1.2.5) to a
// file.
func newCertificate(path string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)}
	public, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: public})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	return text, files.Write(path, 0o600, files.Options{Sync: true}, text)
}
