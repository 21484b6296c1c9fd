// SPDX-License-Identifier: Apache-2.0

// Package s3 keeps caches in a bucket of an S3 server. It is a share.Backend:
//
//	PREFIXblobs/sha256/HEX   blobs
//	PREFIXrefs/NAME          the documents that name them
//
// A blob is sent with its digest as the signed hash of the request's body, so that a server never shows other bytes. A document is replaced on the
// condition that it is the one that was read (If-Match, If-None-Match); servers that do not have conditional writes say so, and there the last writer wins.
// Nothing is ever deleted: a lifecycle rule of the bucket does that, by age, and touch_refresh keeps young what is used.
//
// The client is minio-go. AWS's own adds as much to the program (2 MB), wants more modules for the credentials of containers and machines, and has to be told
// which of its newer checksums the servers of others do not know.
package s3

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/seed-68981b69/slipway/cache/share"
)

const (
	maxDocument = 64 << 20
	// maxSingle is the largest object that S3 takes, or copies, in one request.
	maxSingle = 5 << 30
	// heads is how many objects are looked for at once.
	heads = 16
	// tries is how often a blob is sent when the server or the connection fails.
	tries = 4
	// cloud is where a bucket is that has no endpoint.
	cloud = "https://s3.amazonaws.com"
)

// Options of a Backend.
type Options struct {
	// Bucket and Region are where the objects are. Region may be "".
	Bucket, Region string
	// Prefix is put before all names of objects; it usually ends with a slash.
	Prefix string
	// EndpointURL is that of the server; "" is Amazon's.
	EndpointURL string
	// PathStyle puts the bucket's name into the path instead of the host name.
	PathStyle bool
	// The credentials; without them requests are not signed. See Ambient.
	AccessKeyID, SecretAccessKey, SessionToken string
	// UploadParallelism is how many objects are sent at once; 0 is 4.
	UploadParallelism int
	// TouchRefresh is the age from which on objects that are used again get a new modification time; 0 is never.
	TouchRefresh time.Duration
}

// Secrets are the attributes that must not be shown or kept.
var Secrets = []string{"access_key_id", "secret_access_key", "session_token"}

// Ambient returns the credentials of this process: those of the environment (AWS_ACCESS_KEY_ID and so on), of the shared credentials file, or of
// the role of a container or a machine; empty ones if there are none. It is for clients: an engine has no credentials of its own to lend.
func Ambient() (accessKeyID, secretAccessKey, sessionToken string, err error) {
	v, err := credentials.NewChainCredentials([]credentials.Provider{
		&credentials.EnvAWS{},
		&credentials.FileAWSCredentials{},
		// The address of a cloud's machine does not answer elsewhere.
		&credentials.IAM{Client: &http.Client{Timeout: time.Second}},
	}).GetWithContext(nil)
	return v.AccessKeyID, v.SecretAccessKey, v.SessionToken, err
}

// Check says what is wrong with o.
func (o *Options) Check() error {
	if o.Bucket == "" {
		return errors.New("no bucket: say bucket=NAME")
	}
	if (o.AccessKeyID == "") != (o.SecretAccessKey == "") {
		return errors.New("access_key_id and secret_access_key go together")
	}
	_, err := o.endpoint()
	return err
}

func (o *Options) endpoint() (*url.URL, error) {
	u, err := url.Parse(cmp.Or(o.EndpointURL, cloud))
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("endpoint_url=%s: want http://HOST[:PORT] or https://HOST[:PORT]", redacted(o.EndpointURL))
	}
	return u, nil
}

// ParseOptions takes the attributes of `--cache-to type=s3,…` that are about the place, by BuildKit's names. Others are left to the caller. The second
// result names those that were taken.
func ParseOptions(attrs map[string]string) (Options, []string, error) {
	o := Options{TouchRefresh: 24 * time.Hour}
	var taken []string
	take := func(name string) (string, bool) {
		v, ok := attrs[name]
		if ok {
			taken = append(taken, name)
		}
		return v, ok
	}
	for name, to := range map[string]*string{
		"bucket": &o.Bucket, "region": &o.Region, "prefix": &o.Prefix, "endpoint_url": &o.EndpointURL,
		"access_key_id": &o.AccessKeyID, "secret_access_key": &o.SecretAccessKey, "session_token": &o.SessionToken,
	} {
		*to, _ = take(name)
	}
	var err error
	if v, ok := take("use_path_style"); ok {
		if o.PathStyle, err = strconv.ParseBool(v); err != nil {
			return o, nil, fmt.Errorf("s3 cache: use_path_style=%s: want true or false", v)
		}
	}
	if v, ok := take("upload_parallelism"); ok {
		if o.UploadParallelism, err = strconv.Atoi(v); err != nil || o.UploadParallelism < 1 || o.UploadParallelism > 64 {
			return o, nil, fmt.Errorf("s3 cache: upload_parallelism=%s: want 1 to 64", v)
		}
	}
	if v, ok := take("touch_refresh"); ok {
		if o.TouchRefresh, err = time.ParseDuration(v); err != nil || o.TouchRefresh < 0 {
			return o, nil, fmt.Errorf("s3 cache: touch_refresh=%s: want a duration such as 24h", v)
		}
	}
	slices.Sort(taken)
	return o, taken, nil
}

// Backend is a bucket.
type Backend struct {
	opts      Options
	client    *minio.Core
	transport *http.Transport
	uploads   chan struct{} // one for each object being sent
	now       func() time.Time
	// unconditional is set when the server has said that it has no conditional writes.
	unconditional atomic.Bool
}

var _ share.Backend = (*Backend)(nil)

// New returns the Backend. No request is made.
func New(opts Options) (*Backend, error) {
	if err := opts.Check(); err != nil {
		return nil, fmt.Errorf("s3 cache: %w", err)
	}
	u, err := opts.endpoint()
	if err != nil {
		return nil, fmt.Errorf("s3 cache: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = heads
	transport.DisableCompression = true // bytes as they are
	lookup := minio.BucketLookupAuto
	if opts.PathStyle {
		lookup = minio.BucketLookupPath
	} else if opts.EndpointURL != "" {
		lookup = minio.BucketLookupDNS
	}
	client, err := minio.NewCore(u.Host, &minio.Options{
		Creds: credentials.NewStaticV4(opts.AccessKeyID, opts.SecretAccessKey, opts.SessionToken), Secure: u.Scheme == "https", Transport: transport, Region: cmp.Or(opts.Region, "us-east-1"), BucketLookup: lookup,
		MaxRetries: tries,
	})
	if err != nil {
		return nil, fmt.Errorf("s3 cache: %w", err)
	}
	if opts.UploadParallelism <= 0 {
		opts.UploadParallelism = 4
	}
	return &Backend{
		opts: opts, client: client, transport: transport, uploads: make(chan struct{}, opts.UploadParallelism), now: time.Now,
	}, nil
}

// redacted is a URL without the password that somebody may have put into it.
func redacted(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "…"
	}
	return u.Redacted()
}

func (b *Backend) blobName(d digest.Digest) string {
	return b.opts.Prefix + "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

func (b *Backend) refName(name string) (string, error) {
	if name == "" || len(name) > 512 || slices.ContainsFunc(strings.Split(name, "/"), func(s string) bool { return s == "" || s == "." || s == ".." }) {
		return "", fmt.Errorf("s3 cache: name %q cannot be that of an object", name)
	}
	return b.opts.Prefix + "refs/" + name, nil
}

// failed tells what was done to which object, with ErrNotFound where it fits.
func (b *Backend) failed(doing, object string, err error) error {
	r := minio.ToErrorResponse(err)
	switch {
	case r.StatusCode == http.StatusNotFound && r.Code != minio.NoSuchBucket:
		return fmt.Errorf("s3 cache: %s %s/%s: %w", doing, b.opts.Bucket, object, share.ErrNotFound)
	case r.StatusCode == http.StatusForbidden:
		return fmt.Errorf("s3 cache: %s %s/%s: %w (are the credentials right, and may they do this?)", doing, b.opts.Bucket, object, err)
	}
	return fmt.Errorf("s3 cache: %s %s/%s: %w", doing, b.opts.Bucket, object, err)
}

// Missing implements share.Backend. Objects that are there and older than TouchRefresh are touched.
func (b *Backend) Missing(ctx context.Context, descs []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	missing := make([]bool, len(descs))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(heads)
	for i, d := range descs {
		g.Go(func() error {
			name := b.blobName(d.Digest)
			info, err := b.client.StatObject(gctx, b.opts.Bucket, name, minio.StatObjectOptions{})
			if err != nil {
				err = b.failed("look for", name, err)
				if errors.Is(err, share.ErrNotFound) {
					missing[i], err = true, nil
				}
				return err
			}
			// Something of another size is not the blob, whoever has put it there.
			if missing[i] = info.Size != d.Size; missing[i] {
				return nil
			}
			return b.touch(gctx, name, info)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []ocispec.Descriptor
	for i, d := range descs {
		if missing[i] {
			out = append(out, d)
		}
	}
	return out, nil
}

// touch copies an old object onto itself, for the bucket's lifecycle rules.
func (b *Backend) touch(ctx context.Context, name string, info minio.ObjectInfo) error {
	if b.opts.TouchRefresh == 0 || b.now().Sub(info.LastModified) < b.opts.TouchRefresh || info.Size > maxSingle {
		return nil
	}
	// S3 takes a copy onto itself only if something about the object changes.
	_, err := b.client.Client.CopyObject(ctx,
		minio.CopyDestOptions{
			Bucket: b.opts.Bucket, Object: name, ReplaceMetadata: true,
			UserMetadata: map[string]string{"touched": b.now().UTC().Format(time.RFC3339)},
		},
		minio.CopySrcOptions{Bucket: b.opts.Bucket, Object: name, MatchETag: info.ETag})
	if err != nil {
		return b.failed("touch", name, err)
	}
	return nil
}

// Open implements share.Backend.
func (b *Backend) Open(ctx context.Context, desc ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	if length == 0 {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	var opts minio.GetObjectOptions
	if length > 0 {
		opts.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1)) // SetRange cannot say 0-0
	} else if offset > 0 {
		opts.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	name := b.blobName(desc.Digest)
	r, _, _, err := b.client.GetObject(ctx, b.opts.Bucket, name, opts)
	if err != nil {
		return nil, b.failed("read", name, err)
	}
	return r, nil
}

// Put implements share.Backend.
func (b *Backend) Put(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	select {
	case b.uploads <- struct{}{}:
		defer func() { <-b.uploads }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	missing, err := b.Missing(ctx, []ocispec.Descriptor{desc})
	if err != nil || len(missing) == 0 {
		return err
	}
	if desc.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("s3 cache: blob %s: only SHA-256 is kept", desc.Digest)
	}
	wait := 200 * time.Millisecond
	for try := 1; ; try++ {
		err = b.putOnce(ctx, desc, open)
		if err == nil || try == tries || !retryable(ctx, err) {
			return err
		}
		select {
		case <-time.After(wait): // a server in trouble
			wait *= 4
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// errSource is an error of what is sent, not of the server.
type errSource struct{ error }

func (e errSource) Unwrap() error { return e.error }

func (b *Backend) putOnce(ctx context.Context, desc ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	name := b.blobName(desc.Digest)
	r, err := open()
	if err != nil {
		return errSource{fmt.Errorf("s3 cache: put blob %s: %w", desc.Digest, err)}
	}
	defer r.Close()
	v := &verifier{r: r, desc: desc, hash: sha256.New()}
	if desc.Size <= maxSingle {
		// The server compares the bytes with the hash.
		opts := minio.PutObjectOptions{DisableContentSha256: true}
		_, err = b.client.PutObject(ctx, b.opts.Bucket, name, v, desc.Size, "", desc.Digest.Encoded(), opts)
	} else {
		// In parts; without the last byte they are never put together.
		_, err = b.client.Client.PutObject(ctx, b.opts.Bucket, name, v, desc.Size, minio.PutObjectOptions{})
	}
	if v.err != nil {
		return errSource{fmt.Errorf("s3 cache: put blob %s: %w", desc.Digest, v.err)}
	}
	if err != nil {
		return b.failed("put", name, err)
	}
	return nil
}

// retryable says whether an error may be over soon.
func retryable(ctx context.Context, err error) bool {
	var source errSource
	if ctx.Err() != nil || errors.As(err, &source) || errors.Is(err, share.ErrNotFound) {
		return false
	}
	var r minio.ErrorResponse
	if errors.As(err, &r) {
		return r.StatusCode >= 500 && r.StatusCode != http.StatusNotImplemented || r.StatusCode == http.StatusTooManyRequests || r.StatusCode == http.StatusRequestTimeout
	}
	return true // the connection
}

// verifier fails instead of giving the last bytes of what is not the blob.
type verifier struct {
	r    io.Reader
	desc ocispec.Descriptor
	hash hash.Hash
	n    int64
	err  error // of r, or that it is not the blob
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	n, err := v.r.Read(p)
	v.hash.Write(p[:n])
	v.n += int64(n)
	switch {
	case v.n > v.desc.Size || err == io.EOF && v.n < v.desc.Size:
		v.err = fmt.Errorf("its bytes are not the %d that it should have", v.desc.Size)
	case v.n == v.desc.Size && digest.NewDigest(digest.SHA256, v.hash) != v.desc.Digest:
		v.err = errors.New("its bytes do not have that digest")
	case err != nil && err != io.EOF:
		v.err = err
	}
	if v.err != nil {
		return 0, v.err
	}
	return n, err
}

// Ref implements share.Backend. The version is the object's ETag.
func (b *Backend) Ref(ctx context.Context, name string) ([]byte, string, error) {
	object, err := b.refName(name)
	if err != nil {
		return nil, "", err
	}
	r, info, _, err := b.client.GetObject(ctx, b.opts.Bucket, object, minio.GetObjectOptions{})
	if err != nil {
		return nil, "", b.failed("read", object, err)
	}
	defer r.Close()
	doc, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return nil, "", b.failed("read", object, err)
	}
	if len(doc) > maxDocument {
		return nil, "", fmt.Errorf("s3 cache: read %s/%s: more than %d bytes", b.opts.Bucket, object, maxDocument)
	}
	return doc, info.ETag, nil
}

// PutRef implements share.Backend. A bucket does not need to know the blobs.
func (b *Backend) PutRef(ctx context.Context, name string, document []byte, _ []ocispec.Descriptor, version string) error {
	object, err := b.refName(name)
	if err != nil {
		return err
	}
	put := func(conditional bool) error {
		var opts minio.PutObjectOptions
		opts.DisableContentSha256 = true
		if conditional && version != "" {
			opts.SetMatchETag(version)
		} else if conditional {
			opts.SetMatchETagExcept("*")
		}
		_, err := b.client.PutObject(ctx, b.opts.Bucket, object, bytes.NewReader(document), int64(len(document)), "",
			digest.FromBytes(document).Encoded(), opts)
		return err
	}
	err = put(!b.unconditional.Load())
	r := minio.ToErrorResponse(err)
	if r.StatusCode == http.StatusNotImplemented && !b.unconditional.Load() {
		b.unconditional.Store(true)
		err = put(false)
		r = minio.ToErrorResponse(err)
	}
	switch {
	case err == nil:
		return nil
	case r.StatusCode == http.StatusPreconditionFailed, r.StatusCode == http.StatusConflict, version != "" && r.Code == minio.NoSuchKey:
		return fmt.Errorf("s3 cache: put %s/%s: %w", b.opts.Bucket, object, share.ErrConflict)
	}
	return b.failed("put", object, err)
}

// Close implements share.Backend.
func (b *Backend) Close() error {
	b.transport.CloseIdleConnections()
	return nil
}
