#!/bin/bash
set -e
echo debian > /etc/hostname
mkdir -p /boot
echo quiet > /boot/kernel-parameters
for kernel in /boot/vmlinuz-*; do
    [ -e "$kernel" ] || continue
    ln -sf "$(basename "$kernel")" /boot/vmlinuz
    ln -sf "initrd.img-${kernel#/boot/vmlinuz-}" /boot/initrd
done
