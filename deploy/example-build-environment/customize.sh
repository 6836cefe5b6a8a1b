#!/bin/sh
# Runs in the build environment once sshd listens. Another end than 0 marks the image failed.
set -eu
rsync --archive /usr/share/site/ "$IMAGE_ROOT_PARENT/image-root/"
touch "$IMAGE_ROOT_PARENT/complete"
