FROM debian:bookworm
COPY . /usr/local/go
ENV GOPATH=/go GOTOOLCHAIN=local GOFLAGS=-buildvcs=false
ENV PATH=/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
WORKDIR /go
