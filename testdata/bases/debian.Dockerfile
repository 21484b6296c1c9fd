FROM scratch
ADD rootfs.tar /
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# apt 2.6 can wait for ever for a download that it meant to try again later: try again at once.
COPY <<EOT /etc/apt/apt.conf.d/90retry
Acquire::Retries "3";
Acquire::Retries::Delay "false";
Acquire::http::Timeout "30";
EOT
ENV DEBIAN_FRONTEND=noninteractive
CMD ["bash"]
