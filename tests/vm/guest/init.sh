#!/bin/sh
# The guest's PID 1: what systemd would have mounted, then the agent; reaps whoever is left to it.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t securityfs securityfs /sys/kernel/security
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
mount -t tmpfs -o mode=755,nosuid,nodev run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount --make-rshared /
ln -sfn /proc/self/fd /dev/fd
hostname guest
# What a machine with udev has: these have a device, and no uevent asks for them; overlay is for every tenant.
modprobe -a overlay loop fuse || echo "guest: a module was not loaded"
ip link set lo up
# Debian gives no user a performance counter (3, unknown upstream): here the filter alone is to refuse it.
echo 2 >/proc/sys/kernel/perf_event_paranoid
# The data disk, where there is one, keeps what a test wants to find again after a power cut.
data=$(sed -n 's/.*isochamber.data=\([^ ]*\).*/\1/p' /proc/cmdline)
[ "$data" = later ] || [ ! -b /dev/vdb ] || mount -t ext4 -o "$data" /dev/vdb /srv ||
    echo "guest: the data disk is not to be mounted"
python3 -I -S /opt/isochamber/tests/vm/guest/agent.py &
agent=$!
# dash's wait reaps every child that is left to PID 1 while it waits for this one.
wait $agent
echo "guest: the agent ended with $?"
echo b >/proc/sysrq-trigger
