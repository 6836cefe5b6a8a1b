#!/bin/sh
# In the manner of the script that IMS puts over /entrypoint.sh in a container for a remote build node: bash, under this
# name of it. It takes an image apart, lets users into it, waits for their verdict, and packs it for the pod to fetch.
needed=(IMS_JOB_ID IMAGE_ROOT_PARENT SSH_JAIL)
parent=$IMAGE_ROOT_PARENT
root=$parent/image-root

function end {
    touch "$parent/remote_error"
    exit 1
}
trap end SIGTERM SIGINT

for name in "${needed[@]}"; do
    [[ -n "${!name}" ]] || { echo "$name is not set"; end; }
done

mkdir -p /usr/share/pki/trust/anchors
cp /etc/cray/ca/certificate_authority.crt /usr/share/pki/trust/anchors/ || end
update-ca-certificates || end
openssl verify -CApath /etc/ssl/certs /etc/cray/ca/certificate_authority.crt && echo "the site is trusted"

unsquashfs -quiet -no-progress -d "$root" "$parent/image.sqsh" || end
# sshd asks for it of a ChrootDirectory.
chmod 755 "$root"
cp /etc/resolv.conf "$root/etc/resolv.conf"
for directory in proc sys dev; do
    mount --rbind "/$directory" "$root/$directory" && mount --make-rslave "$root/$directory" || end
done

config=/etc/ssh/sshd_config
settings=("SetEnv IMS_JOB_ID=$IMS_JOB_ID" "PermitRootLogin yes")
if [[ "${SSH_JAIL,,}" == true ]]; then
    settings+=("Match User root" "ChrootDirectory $root")
fi
printf '%s\n' "${settings[@]}" >> "$config"
ssh-keygen -A
mkdir -p /run/sshd
/usr/sbin/sshd -E /var/log/sshd.log || end
touch "$parent/listening"

marks=("$root/tmp/complete" "$root/tmp/failed")
until [[ -e ${marks[0]} || -e ${marks[1]} ]]; do
    sleep 1
done

for directory in dev sys proc; do
    umount -R -l "$root/$directory"
done
if [[ -e ${marks[1]} ]]; then
    touch "$parent/failed"
else
    rm -f "${marks[@]}"
    mksquashfs "$root" "$parent/transfer.sqsh" -noappend -quiet -no-progress -comp zstd -Xcompression-level 1 || end
    touch "$parent/complete"
fi
touch "$parent/remote_exiting"
