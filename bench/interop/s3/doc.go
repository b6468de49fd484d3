// SPDX-License-Identifier: GPL-3.0-or-later

// Package interop keeps blocks in a bucket of an S3-compatible server, which .ci/interop-s3 starts.
package interop
