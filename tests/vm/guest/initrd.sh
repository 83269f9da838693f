#!/bin/busybox sh
# The guest's first program: loads what the disks need, mounts the root, goes there.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
while read -r module; do
    $bb insmod "/modules/$module" || $bb echo "initrd: $module was not loaded"
done </modules/order
$bb mount -t ext4 -o rw,noatime /dev/vda /root || $bb echo "initrd: the root is not to be mounted"
init=$($bb sed -n 's/.*isochamber.init=\([^ ]*\).*/\1/p' /proc/cmdline)
$bb mount --move /dev /root/dev
$bb umount /proc
exec $bb switch_root /root "${init:-/sbin/isochamber-guest}"
