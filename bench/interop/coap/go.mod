module codeberg.org/guix-substitute-eris/guix-substitute-eris/bench/interop/coap

go 1.26.0

require (
	codeberg.org/guix-substitute-eris/guix-substitute-eris v0.0.0
	github.com/plgd-dev/go-coap/v3 v3.8.1
)

require (
	github.com/brutella/dnssd v1.2.14 // indirect
	github.com/coder/websocket v1.8.15 // indirect
	github.com/dsnet/golib/memfile v1.0.0 // indirect
	github.com/miekg/dns v1.1.61 // indirect
	github.com/pion/dtls/v3 v3.1.15 // indirect
	github.com/pion/logging v0.2.4 // indirect
	github.com/pion/transport/v5 v5.1.4 // indirect
	github.com/vishvananda/netlink v1.2.1-beta.2 // indirect
	github.com/vishvananda/netns v0.0.0-20200728191858-db3c7e526aae // indirect
	golang.org/x/crypto v0.59.0 // indirect
	golang.org/x/exp v0.0.0-20261014143641-f0251eb4aa3e // indirect
	golang.org/x/mod v0.42.0 // indirect
	golang.org/x/net v0.62.0 // indirect
	golang.org/x/sync v0.25.0 // indirect
	golang.org/x/sys v0.50.0 // indirect
	golang.org/x/tools v0.52.0 // indirect
)

replace codeberg.org/guix-substitute-eris/guix-substitute-eris => ../../..
