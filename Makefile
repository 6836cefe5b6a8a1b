# make run     opens a small Debian image root over SSH, jailed (IMAGE_ROOT=/path/to/yours to take your own)
# make test    all tests
# make bench   the figures
# All install what they need on a Debian 12 machine with Rust.

CACHE ?= $(HOME)/.cache/ims-sshd
IMAGE_ROOT ?= $(CACHE)/demo
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

RUN_PACKAGES := openssh-server openssh-client openssh-sftp-server mmdebstrap busybox-static
TEST_PACKAGES := $(RUN_PACKAGES) rsync python3-paramiko strace
BENCH_PACKAGES := $(RUN_PACKAGES) gcc libc6-dev bubblewrap

.PHONY: run build test bench install-run install-test install-bench

run: install-run build
	$(SUDO) tests/image-roots $(CACHE)
	[ -e $(IMAGE_ROOT) ] || $(SUDO) cp -aT $(CACHE)/debian $(IMAGE_ROOT)
	$(SUDO) "$$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/$$(rustc --print host-tuple)/release/ims-sshd" customize $(IMAGE_ROOT)

build:
	cargo build --release --locked

test: install-test
	$(SUDO) tests/image-roots $(CACHE)
	IMS_SSHD_CACHE=$(CACHE) cargo test --locked

bench: install-bench build
	$(SUDO) tests/image-roots $(CACHE)
	IMS_SSHD_CACHE=$(CACHE) cargo bench --locked

install-run install-test install-bench: install-%:
	@tests/install-packages $($(shell echo $* | tr a-z A-Z)_PACKAGES)
