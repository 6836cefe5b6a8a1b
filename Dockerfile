# Three images: 'ims-sshd' is that of the build environment and of the containers beside it, 'builder' that of a create job's build, 'service'
# that of the image management service.
#
# The build environment's image: OpenSSH's server, what unpacks and packs an image root, and the two programs. Both bases can be replaced
# by others of the same distribution, and named by digest: make image BASE_IMAGE=debian@sha256:… RUST_IMAGE=rust@sha256:…
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS crates
WORKDIR /src
# The crates are compiled with empty programs, in a layer that a change of the sources leaves as it is. Of the other packages of the workspace
# cargo reads the manifests; they stay empty.
COPY .cargo .cargo
COPY Cargo.toml Cargo.lock ./
COPY tests/testbed/Cargo.toml tests/testbed/
COPY service/Cargo.toml service/
COPY deploy/packages/Cargo.toml deploy/packages/
COPY deploy/cargo-release deploy/
RUN mkdir -p src/bin service/src tests/testbed/src deploy/packages/src \
    && touch src/lib.rs service/src/lib.rs tests/testbed/src/lib.rs deploy/packages/src/lib.rs \
    && echo 'fn main() {}' | tee service/src/main.rs > deploy/packages/src/main.rs \
    && echo 'fn main() {}' | tee src/bin/ims-jail-shell.rs > src/bin/ims-sshd.rs \
    && deploy/cargo-release build --bins

FROM crates AS build
COPY LICENSE ./
COPY deploy/sbom deploy/stage deploy/
COPY sshd_config.d sshd_config.d
COPY src src
# Sources may be older than the empty ones, which cargo would take for up to date.
RUN touch src/lib.rs src/bin/*.rs && deploy/cargo-release build --bins \
    && deploy/stage "target/$(rustc --print host-tuple)/release" /stage

FROM crates AS build-service
RUN deploy/cargo-release build --package ims-service
COPY LICENSE ./
COPY deploy/sbom deploy/stage deploy/
COPY deploy/systemd deploy/systemd
COPY sshd_config.d sshd_config.d
COPY src src
COPY service/src service/src
RUN touch src/lib.rs service/src/lib.rs service/src/main.rs && deploy/cargo-release build --package ims-service \
    && deploy/stage "target/$(rustc --print host-tuple)/release" /stage ims

# Of the package's forty programs the one for the other architecture, with its licence.
FROM ${BASE_IMAGE} AS qemu
RUN apt-get -q update \
    && cd /tmp && apt-get -q download qemu-user-static \
    && case "$(dpkg --print-architecture)" in arm64) other=x86_64 ;; *) other=aarch64 ;; esac \
    && mkdir /out && dpkg-deb --fsys-tarfile qemu-user-static_*.deb \
        | tar -x -C /out "./usr/bin/qemu-$other-static" ./usr/share/doc/qemu-user-static/copyright \
    && rm -rf qemu-user-static_*.deb /var/lib/apt/lists/*

# The image of the container that builds recipes: kiwi-ng and the package managers, as Debian has them.
FROM ${BASE_IMAGE} AS builder
RUN apt-get -q update \
    && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
        ca-certificates createrepo-c debootstrap dnf gpg kiwi rpm rsync xz-utils zypper \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
COPY --from=qemu /out/ /
COPY --from=build /stage/ /usr/
COPY deploy/sbom /tmp/
RUN /tmp/sbom debian ims-sshd-builder "$(ims-sshd --version | cut -d ' ' -f 2)" > /usr/share/doc/ims-sshd/image.cdx.json && rm /tmp/sbom
ENV RECIPE_ROOT_PARENT=/mnt/image/recipe \
    IMAGE_ROOT_PARENT=/mnt/image
ENTRYPOINT ["/usr/bin/ims-sshd", "build"]

ARG LICENSES=MIT
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="ims-sshd-builder" \
      org.opencontainers.image.description="Builds an image root from a recipe of kiwi-ng" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

FROM ${BASE_IMAGE} AS service
# ssh asks remote build nodes. Python and app.py are for procedures that run a script of their own in this container.
RUN apt-get -q update \
    && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends ca-certificates openssh-client python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
COPY deploy/service/app.py /app/src/server/
COPY --from=build-service /stage/bin/ /usr/bin/
COPY --from=build-service /stage/share/ /usr/share/
COPY deploy/sbom /tmp/
RUN /tmp/sbom debian ims-service "$(ims --version | cut -d ' ' -f 2)" > /usr/share/doc/ims/image.cdx.json && rm /tmp/sbom \
    && install -d -o 65534 -g 65534 /var/ims/data
USER 65534:65534
EXPOSE 9000
ENTRYPOINT ["/usr/bin/ims", "serve"]

ARG LICENSES=MIT
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="ims-service" \
      org.opencontainers.image.description="Keeps records of images, recipes, public keys and jobs, and starts the jobs" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

FROM ${BASE_IMAGE} AS ims-sshd
# Host keys are the environment's own: made at its start, never shared by all that run this image.
RUN apt-get -q update \
    && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
        bzip2 ca-certificates openssh-server openssh-sftp-server squashfs-tools xz-utils zstd \
    && rm -rf /etc/ssh/ssh_host_* /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
# IMS derives the container for a remote build node from this image: its script is bash under '#!/bin/sh', and puts the site's certificate
# where SUSE has such.
RUN ln -sf bash /bin/sh \
    && mkdir -p /usr/share/pki/trust && ln -s /usr/local/share/ca-certificates /usr/share/pki/trust/anchors
COPY --from=qemu /out/ /
COPY --from=build /stage/ /usr/
# Distributions' packages in this image; what is linked into the programs is beside it.
COPY deploy/sbom /tmp/
RUN /tmp/sbom debian ims-sshd "$(ims-sshd --version | cut -d ' ' -f 2)" > /usr/share/doc/ims-sshd/image.cdx.json && rm /tmp/sbom
ARG REVISION=unknown
# Manifests start /entrypoint.sh, and a customization script is put over /run_script.sh.
RUN ln -s /usr/bin/ims-sshd /entrypoint.sh && touch /run_script.sh && echo "${REVISION}" > /gitInfo.txt
# Manifests of create jobs start the scripts of their init containers by path.
RUN mkdir /scripts && for script in fetch-recipe.sh wait_for_kiwi_repos.py build_ca_rpm.py; do \
        ln -s /usr/bin/ims-sshd "/scripts/$script"; done

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
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.description="${DESCRIPTION}" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
