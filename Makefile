# make run     opens a small Debian image over SSH, jailed, and publishes what becomes of it in out/ (FROM=/path/to/image.sqsh takes yours,
#              OUT=… puts it elsewhere; IMAGE_ROOT=/path/to/folder changes one where it is and publishes nothing)
# make test    all tests
# make bench   the figures, beside those of the peers, for docs/BENCHMARKS.md
# make image   the container image, built by docker, podman or buildah (IMAGE=name:tag, BUILDER=…, BUILD_FLAGS=… to have it otherwise)
# The first three install what they need on a Debian 12 machine with Rust.

CACHE ?= $(HOME)/.cache/ims-sshd
FROM ?= $(CACHE)/demo.sqsh
OUT ?= out
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Built as who calls make, run as root: cargo starts the program through sudo.
AS_ROOT := $(if $(SUDO),--config "target.'cfg(all())'.runner='sudo -E'")

RUN_PACKAGES := openssh-server openssh-client openssh-sftp-server mmdebstrap busybox-static squashfs-tools cpio
TEST_PACKAGES := $(RUN_PACKAGES) rsync python3-paramiko strace bindfs \
	acl attr fish git less libcap2-bin man-db screen sshfs sudo tmux vim zsh \
	qemu-user-static rpm musl-tools \
	podman runc catatonit ansible python3-venv xz-utils zstd openssl
# Kubernetes' schemas, the newest ansible-core that runs on Debian's Python and manages it, an S3 server.
TEST_PYTHON_PACKAGES := kubernetes-validate==1.37.0 ansible-core==2.19.14 'moto[s3,server]==5.2.1'
BENCH_PACKAGES := $(RUN_PACKAGES) gcc libc6-dev bubblewrap systemd-container util-linux podman runc curl rsync ansible-core

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
REVISION := $(or $(shell git rev-parse HEAD 2>/dev/null),unknown)
# The last commit that changed what the image is made of, and its date: with any other, what is cached of it would not hold.
IMAGE_COMMIT := $(or $(shell git log -1 --format='%H %cI' -- Dockerfile .cargo Cargo.toml Cargo.lock src sshd_config.d 2>/dev/null),unknown unknown)
SOURCE := $(or $(shell git config --get remote.origin.url 2>/dev/null),unknown)
BUILDER ?= $(firstword $(foreach name,docker podman buildah,$(shell command -v $(name))))
CREATED ?= $(shell date -u +%Y-%m-%dT%H:%M:%SZ)
IMAGE ?= ims-sshd:$(VERSION)

.PHONY: run build test bench image install-run install-test install-bench

run: install-run build
	$(SUDO) tests/image-roots $(CACHE) debian busybox
	$(if $(IMAGE_ROOT),,$(SUDO) tests/demo-image $(CACHE))
	cargo $(AS_ROOT) run --release --locked --quiet --bin ims-sshd -- customize $(or $(IMAGE_ROOT),$(FROM) --output $(OUT))

build:
	cargo build --release --locked

test: install-test
	$(SUDO) tests/image-roots $(CACHE) debian busybox debian-arm64 rpm musl distroless node managed
	$(SUDO) tests/python-packages $(CACHE) $(TEST_PYTHON_PACKAGES)
	$(SUDO) tests/container-images $(CACHE) $(VERSION) $(IMAGE_COMMIT)
	IMS_SSHD_CACHE=$(CACHE) cargo $(AS_ROOT) test --locked

bench: install-bench build
	$(SUDO) tests/image-roots $(CACHE) debian busybox managed
	$(SUDO) tests/container-images $(CACHE) $(VERSION) $(IMAGE_COMMIT)
	IMS_SSHD_CACHE=$(CACHE) cargo $(AS_ROOT) bench --locked --bench figures

image:
	$(or $(BUILDER),$(error make image needs docker, podman or buildah)) build $(BUILD_FLAGS) -t $(IMAGE) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --build-arg SOURCE=$(SOURCE) \
		--build-arg CREATED=$(CREATED) .

install-run install-test install-bench: install-%:
	@tests/install-packages $($(shell echo $* | tr a-z A-Z)_PACKAGES)
