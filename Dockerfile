# The build environment's image: OpenSSH's server, and the two programs. Both bases can be replaced by others of the same distribution.
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked \
    && install -D -t /out "target/$(rustc --print host-tuple)/release/ims-sshd" \
        "target/$(rustc --print host-tuple)/release/ims-jail-shell"

FROM ${BASE_IMAGE}
# Host keys are the environment's own: made at its start, never shared by all that run this image.
RUN apt-get -q update \
    && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends openssh-server openssh-sftp-server \
    && rm -rf /etc/ssh/ssh_host_* /var/lib/apt/lists/*
COPY --from=build /out/ /usr/bin/
# Manifests start /entrypoint.sh, and a customization script is put over /run_script.sh.
RUN ln -s /usr/bin/ims-sshd /entrypoint.sh && touch /run_script.sh

ENV SSHD_OPTIONS="" \
    IMAGE_ROOT_PARENT=/mnt/image \
    CUSTOMIZATION_SCRIPT=/run_script.sh
ENTRYPOINT ["/usr/bin/ims-sshd", "entrypoint"]

ARG TITLE=ims-sshd
ARG DESCRIPTION="Opens an image root to people and to Ansible over SSH, jailed inside it"
ARG LICENSES=MIT
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.description="${DESCRIPTION}" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
