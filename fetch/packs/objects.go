// SPDX-License-Identifier: GPL-3.0-or-later

package packs

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"codeberg.org/guix-substitute-eris/guix-substitute-eris/eris"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/storeurl"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/fetch/web"
	"codeberg.org/guix-substitute-eris/guix-substitute-eris/internal/files"
)

// directoryOf keeps packs as files.
type directoryOf struct{ storeurl.URL }

// String implements objects.
func (d directoryOf) String() string { return d.URL.String() + "?packed" }

// Close implements objects.
func (d directoryOf) Close() error { return nil }

// Renew implements objects.
func (d directoryOf) Renew() {}

// Range implements objects.
func (d directoryOf) Range(_ context.Context, name string, from, n int64, use func(body io.Reader, from, total int64) error) error {
	file, info, err := files.OpenRegular(filepath.Join(d.Path, name), os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return eris.ErrNotFound
	} else if err != nil {
		return err
	}
	defer file.Close()
	if from < 0 {
		from = max(0, info.Size()+from)
	}
	return use(io.NewSectionReader(file, from, n), from, info.Size())
}

// PutObject implements objects: it gives the file, which is in the same directory, its name.
func (d directoryOf) PutObject(_ context.Context, name string, content *os.File, _ int64, _ [sha256.Size]byte) error {
	if err := content.Chmod(0o644); err != nil {
		return err
	}
	if err := content.Sync(); err != nil {
		return err
	}
	if err := os.Rename(content.Name(), filepath.Join(d.Path, name)); err != nil {
		return err
	}
	return files.SyncDirectory(d.Path)
}

var errEndpoint = errors.New("the endpoint is not of the form https://HOST or http://HOST, percent-encoded where need be")

// bucket keeps packs as objects of a bucket that speaks the protocol of S3, addressed by path.
type bucket struct {
	*web.Store
	name string
}

// String implements objects.
func (b bucket) String() string { return b.name }

// openBucket opens a bucket. Requests are signed if the environment has credentials.
func openBucket(u storeurl.URL, o web.Options) (objects, error) {
	region := cmp.Or(os.Getenv("AWS_REGION"), "us-east-1")
	endpoint := strings.TrimRight(cmp.Or(u.Endpoint, "https://s3."+region+".amazonaws.com"), "/")
	query := "?packed"
	switch scheme, _, _ := strings.Cut(endpoint, "://"); {
	case strings.ContainsAny(endpoint, "?#@"), scheme != "http" && scheme != "https":
		return nil, errEndpoint
	case scheme == "https":
		query += "&verify"
	}
	credentials := aws.Credentials{
		AccessKeyID: os.Getenv("AWS_ACCESS_KEY_ID"), SecretAccessKey: os.Getenv("AWS_SECRET_ACCESS_KEY"),
		SessionToken: os.Getenv("AWS_SESSION_TOKEN"),
	}
	if credentials.HasKeys() {
		signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
		o.Sign = func(r *http.Request, sum [sha256.Size]byte) error {
			if r.GetBody == nil {
				sum = sha256.Sum256(nil)
			}
			text := hex.EncodeToString(sum[:])
			r.Header.Set("X-Amz-Content-Sha256", text)
			// What is not sent must not be signed, see package httpclient.
			kept := r.Header
			r.Header = r.Header.Clone()
			maps.DeleteFunc(r.Header, func(_ string, values []string) bool { return len(values) == 0 })
			err := signer.SignHTTP(context.Background(), credentials, r, text, "s3", region, time.Now())
			maps.Copy(kept, r.Header)
			r.Header = kept
			return err
		}
	}
	store, err := web.Open(endpoint+"/"+u.Host+u.Path+query, o)
	if err != nil {
		return nil, err
	}
	return bucket{store, u.String()}, nil
}
