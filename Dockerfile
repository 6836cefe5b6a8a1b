# The build environment's image: OpenSSH's server, what unpacks and packs an image root, and the two programs. Both bases can be replaced
# by others of the same distribution.
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bins \
    && install -D -t /out "target/$(rustc --print host-tuple)/release/ims-sshd" \
        "target/$(rustc --print host-tuple)/release/ims-jail-shell" \
    && mkdir -p /share/bash-completion/completions /share/man/man1 && /out/ims-sshd man /share/man/man1 \
    && /out/ims-sshd completions bash > /share/bash-completion/completions/ims-sshd

# Of the package's forty programs the one for the other architecture, with its licence.
FROM ${BASE_IMAGE} AS qemu
RUN apt-get -q update \
    && cd /tmp && apt-get -q download qemu-user-static \
    && case "$(dpkg --print-architecture)" in arm64) other=x86_64 ;; *) other=aarch64 ;; esac \
    && mkdir /out && dpkg-deb --fsys-tarfile qemu-user-static_*.deb \
        | tar -x -C /out "./usr/bin/qemu-$other-static" ./usr/share/doc/qemu-user-static/copyright \
    && rm -rf qemu-user-static_*.deb /var/lib/apt/lists/*

FROM ${BASE_IMAGE}
# Host keys are the environment's own: made at its start, never shared by all that run this image.
RUN apt-get -q update \
    && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
        ca-certificates openssh-server openssh-sftp-server squashfs-tools xz-utils zstd \
    && rm -rf /etc/ssh/ssh_host_* /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
# IMS derives the container for a remote build node from this image: its script is bash under '#!/bin/sh', and puts the site's certificate
# where SUSE has such.
RUN ln -sf bash /bin/sh \
    && mkdir -p /usr/share/pki/trust && ln -s /usr/local/share/ca-certificates /usr/share/pki/trust/anchors
COPY --from=qemu /out/ /
COPY --from=build /out/ /usr/bin/
COPY --from=build /share/ /usr/share/
ARG REVISION=unknown
# Manifests start /entrypoint.sh, and a customization script is put over /run_script.sh.
RUN ln -s /usr/bin/ims-sshd /entrypoint.sh && touch /run_script.sh && echo "${REVISION}" > /gitInfo.txt

ENV SSHD_OPTIONS="" \
    IMAGE_ROOT_PARENT=/mnt/image \
    CUSTOMIZATION_SCRIPT=/run_script.sh
EXPOSE 22
ENTRYPOINT ["/usr/bin/ims-sshd", "entrypoint"]

ARG TITLE=ims-sshd
ARG DESCRIPTION="Opens an image root to people and to Ansible over SSH, jailed inside it"
ARG LICENSES=MIT
ARG VERSION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.description="${DESCRIPTION}" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
