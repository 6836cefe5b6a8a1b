# 'make' alone lists what can be made.

# One word of the shell, whatever it holds.
quoted = '$(subst ','\'',$(1))'

CACHE ?= $(HOME)/.cache/ims-sshd
FROM ?= $(CACHE)/demo.sqsh
OUT ?= out
PREFIX ?= /usr/local
OPENED = $(if $(IMAGE_ROOT),$(call quoted,$(IMAGE_ROOT)),$(call quoted,$(FROM)) --output $(call quoted,$(OUT)))
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Built as who calls make, run as root: cargo starts the tests through sudo.
AS_ROOT := $(if $(SUDO),--config "target.'cfg(all())'.runner='sudo -E'")

# Debian's names. tests/install-packages knows those of rpm systems, for the first of these lists.
RUN_PACKAGES := openssh-server openssh-client openssh-sftp-server squashfs-tools
DEMO_PACKAGES := mmdebstrap busybox-static cpio
TEST_PACKAGES := $(RUN_PACKAGES) $(DEMO_PACKAGES) squashfs-tools-ng rsync python3-paramiko strace bindfs \
	acl attr fish git less libcap2-bin man-db screen sshfs sudo tmux vim zsh \
	qemu-user-static rpm musl-tools \
	podman runc catatonit ansible curl python3-venv bzip2 xz-utils zstd openssl postgresql
# Kubernetes' schemas, the newest ansible-core that runs on Debian's Python and manages it, an S3 server, a client
# that makes requests from an OpenAPI document.
TEST_PYTHON_PACKAGES := kubernetes-validate==1.37.0 ansible-core==2.19.14 'moto[s3,server]==5.2.1' schemathesis==4.32.5
# kiwi-ng, and the package managers that it builds by.
RECIPE_PACKAGES := rpm createrepo-c zypper dnf debootstrap dpkg-dev busybox-static xz-utils
KIWI := kiwi==11.1.6
# Further versions that tests build by: make test KIWIS="9.24.61 10.2.45"
KIWIS ?=
BENCH_PACKAGES := $(RUN_PACKAGES) $(DEMO_PACKAGES) gcc libc6-dev bubblewrap systemd-container util-linux podman runc curl rsync ansible-core
# The stack of upstream's image management service.
BENCH_PYTHON_PACKAGES := flask-marshmallow==1.5.0 gunicorn==27.0.1

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
RUST_VERSION := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
REVISION := $(or $(shell git rev-parse HEAD 2>/dev/null),unknown)
# The last commit that changed what the image is made of, and its date: with any other, what is cached of it would not hold.
IMAGE_COMMIT := $(or $(shell git log -1 --format='%H %cI' -- \
	$$(sed -n 's/^!//p' .dockerignore) Dockerfile 2>/dev/null),unknown unknown)
# Without a login, which a URL to clone from may have.
SOURCE := $(or $(shell git config --get remote.origin.url 2>/dev/null | sed 's|://[^/]*@|://|; s|?.*||'),unknown)
CREATED ?= $(shell date -u +%Y-%m-%dT%H:%M:%SZ)
IMAGE ?= ims-sshd:$(VERSION)
BUILDER_IMAGE ?= ims-sshd-builder:$(VERSION)
SERVICE_IMAGE ?= ims-service:$(VERSION)

STAGE := target/stage
SOURCES := $(shell find src sshd_config.d .cargo -type f) Cargo.toml Cargo.lock deploy/cargo-release deploy/stage deploy/sbom
# Time of what is in packages: that of the last commit, so that one commit makes the same packages.
SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),1577836800)
PACKAGES := target/packages

# Which test programs have a test of that name, and what those need besides Rust.
ifdef TEST
TEST_PROGRAMS := $(shell tests/programs-with-test $(call quoted,$(TEST)))
else
TEST_PROGRAMS := lib deploy squashfs suite publish recipe remote service pod
endif
NEEDED := $(if $(filter squashfs suite publish recipe remote service pod,$(TEST_PROGRAMS)),install-test test-roots) \
	$(if $(filter deploy suite publish recipe remote service pod,$(TEST_PROGRAMS)),test-python) \
	$(if $(filter recipe service,$(TEST_PROGRAMS)),test-recipes) $(if $(filter service pod,$(TEST_PROGRAMS)),test-containers)

.PHONY: help run build install packages uninstall check test bench image clean tools demo kiwi test-roots test-python test-recipes test-containers \
	install-run install-demo install-test install-recipe install-bench

help:
	@echo 'make run FROM=IMAGE     opens IMAGE (a squashfs, an archive, a URL) over SSH and publishes the result in out/; OUT=… puts it'
	@echo '                        elsewhere. Without FROM it makes a small Debian first; IMAGE_ROOT=DIRECTORY has the changes applied to it'
	@echo 'make run RECIPE=PATH    builds an image from a recipe of kiwi-ng and publishes it in out/; SET="NAME=VALUE …" fills its templates in'
	@echo 'make build              builds the programs, man pages and completions'
	@echo 'make install            installs them below /usr/local (PREFIX=…, DESTDIR=…); make uninstall removes them'
	@echo 'make packages           builds .deb and .rpm of the programs, with their bills of materials and checksums, in $(PACKAGES)'
	@echo 'make check              quick: formatting, clippy, unit tests'
	@echo 'make test               all tests; TEST=NAME those whose name contains NAME, with what they need'
	@echo 'make bench              the benchmarks beside those of the peers, for docs/BENCHMARKS.md'
	@echo 'make image              the container images: of sessions, of recipes, of the service (IMAGE=NAME:TAG, BUILDER_IMAGE=NAME:TAG,'
	@echo '                        SERVICE_IMAGE=NAME:TAG, BUILDER=…, RUST_IMAGE=…, BASE_IMAGE=…, BUILD_FLAGS=…)'
	@echo 'make clean              removes what was built; images for tests and for make run stay in $(CACHE)'

ifdef RECIPE
# The whole job on one machine: fetch, build, pack, publish.
run: install-run kiwi build
	$(if $(SUDO),$(SUDO) -E) env PATH=$(call quoted,$(CACHE)/kiwi/bin):"$$PATH" $(STAGE)/bin/ims-sshd create $(call quoted,$(RECIPE)) \
		--output $(call quoted,$(OUT)) $(foreach value,$(SET),--set $(call quoted,$(value)))
else
run: install-run $(if $(or $(IMAGE_ROOT),$(filter-out file,$(origin FROM))),,demo) build
	@echo "The program is $(CURDIR)/$(STAGE)/bin/ims-sshd; 'make install' installs it."
	$(if $(SUDO),$(SUDO) -E) $(STAGE)/bin/ims-sshd customize $(OPENED)
endif

demo: install-demo
	$(SUDO) tests/image-roots $(call quoted,$(CACHE)) debian busybox
	$(SUDO) tests/demo-image $(call quoted,$(CACHE))

build: $(STAGE)/bin/ims-sshd

$(STAGE)/bin/ims-sshd: $(SOURCES)
	@$(MAKE) --no-print-directory tools
	deploy/cargo-release build
	@deploy/stage "$${CARGO_TARGET_DIR:-target}/$$(rustc --print host-tuple)/release" $(STAGE)

# The programs are linked statically.
tools:
	@command -v cargo > /dev/null || { echo "cannot build: there is no cargo for $$(id -un); install Rust $(RUST_VERSION) or newer" \
		"(https://rustup.rs), or run 'make build' as the user who has it" >&2; exit 1; }
	@command -v cc > /dev/null && case $$(cc -print-file-name=libc.a) in /*) ;; *) false ;; esac || \
		{ echo "cannot build: a C compiler or its static library is missing; 'apt-get install gcc libc6-dev'" \
		"or 'dnf install gcc glibc-static' (of EL it is in the repository crb) or 'zypper install gcc glibc-devel-static'" >&2; exit 1; }

install: build
	install -D -t $(call quoted,$(DESTDIR)$(PREFIX)/bin) $(STAGE)/bin/*
	to=$$(realpath -m $(call quoted,$(DESTDIR)/$(PREFIX))) && cd $(STAGE) && \
		find share -type f -exec install -D -m 644 '{}' "$$to/{}" ';'

# The packages of both formats, with what is linked into them and their checksums.
packages: export SOURCE_DATE_EPOCH := $(SOURCE_DATE_EPOCH)
packages: build
	deploy/cargo-release build --package ims-service
	cargo build --quiet --locked --package ims-packages
	rm -rf $(PACKAGES) $(STAGE).packages
	@programs=$${CARGO_TARGET_DIR:-target}/$$(rustc --print host-tuple) && for name in ims-sshd ims; do \
		stage=$(STAGE).packages/$$name && deploy/stage "$$programs/release" "$$stage" "$$name" && \
		"$$programs/debug/ims-packages" "$$name" $(VERSION) "$$stage" $(PACKAGES) && \
		cp "$$stage/share/doc/$$name/sbom.cdx.json" "$(PACKAGES)/$$name-$(VERSION).cdx.json" || exit; done
	cd $(PACKAGES) && sha256sum -- * > ../SHA256SUMS && mv ../SHA256SUMS .

uninstall:
	cd $(call quoted,$(DESTDIR)$(PREFIX)) && rm -rf bin/ims-sshd bin/ims-jail-shell share/doc/ims-sshd share/man/man1/ims-sshd.1 \
		share/man/man1/ims-sshd-*.1 share/bash-completion/completions/ims-sshd share/zsh/site-functions/_ims-sshd \
		share/fish/vendor_completions.d/ims-sshd.fish

check: tools
	cargo fmt --check
	cargo clippy --locked --all-targets --workspace -- -D warnings
	cargo $(AS_ROOT) test --locked --workspace --lib

test: tools $(NEEDED)
	$(if $(TEST_PROGRAMS),,@echo "no test's name contains" $(call quoted,$(TEST)) >&2; exit 1)
	IMS_SSHD_CACHE=$(call quoted,$(CACHE)) IMS_SSHD_TEST_KIWIS="$(KIWIS)" cargo $(AS_ROOT) test --locked --workspace --no-fail-fast \
		$(if $(TEST),$(patsubst %,--test %,$(filter-out lib,$(TEST_PROGRAMS))) $(if $(filter lib,$(TEST_PROGRAMS)),--lib) $(call quoted,$(TEST)))

test-roots: install-test
	$(SUDO) tests/image-roots $(call quoted,$(CACHE)) debian busybox debian-arm64 rpm musl distroless node managed debian-host rpm-host

test-python:
	@tests/install-packages python3-venv
	$(SUDO) tests/python-packages $(call quoted,$(CACHE)) $(TEST_PYTHON_PACKAGES)

kiwi: install-recipe
	@tests/install-packages python3-venv
	$(SUDO) tests/python-packages $(call quoted,$(CACHE)) $(KIWI)

test-recipes: kiwi test-python
	$(foreach version,$(KIWIS),$(SUDO) tests/python-packages $(call quoted,$(CACHE)/kiwis/$(version)) kiwi==$(version) &&) true
	$(SUDO) tests/debian-archive $(call quoted,$(CACHE))

test-containers: install-test install-recipe test-roots
	$(SUDO) tests/debian-archive $(call quoted,$(CACHE))
	$(SUDO) tests/container-images $(call quoted,$(CACHE)) $(VERSION) $(IMAGE_COMMIT)

bench: install-bench kiwi build
	deploy/cargo-release build --package ims-service
	$(SUDO) tests/image-roots $(call quoted,$(CACHE)) debian busybox managed
	$(SUDO) tests/debian-archive $(call quoted,$(CACHE))
	$(SUDO) tests/container-images $(call quoted,$(CACHE)) $(VERSION) $(IMAGE_COMMIT)
	$(SUDO) tests/python-packages $(call quoted,$(CACHE)) $(BENCH_PYTHON_PACKAGES)
	IMS_SSHD_CACHE=$(call quoted,$(CACHE)) deploy/cargo-release bench $(AS_ROOT) --bench benchmarks

image: export SOURCE := $(SOURCE)
image:
	@$(if $(BUILDER),,builder=$$(deploy/image-builder) && )\
		for target in ims-sshd:$(call quoted,$(IMAGE)) builder:$(call quoted,$(BUILDER_IMAGE)) service:$(call quoted,$(SERVICE_IMAGE)); do \
		$(or $(BUILDER),"$$builder") build $(BUILD_FLAGS) --target "$${target%%:*}" -t "$${target#*:}" \
		$(foreach argument,RUST_IMAGE BASE_IMAGE,$(if $($(argument)),--build-arg $(call quoted,$(argument)=$($(argument))))) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --build-arg SOURCE="$$SOURCE" \
		--build-arg CREATED=$(CREATED) . || exit; done

clean:
	rm -rf $(STAGE) $(STAGE).packages $(PACKAGES)
	cargo clean

install-run install-demo install-test install-recipe install-bench: install-%:
	@tests/install-packages $($(shell echo $* | tr a-z A-Z)_PACKAGES)
