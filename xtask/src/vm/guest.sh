#!/bin/sh
# In the guest, on its own root: mounts what a Linux machine has, puts the payload where it was built, runs it, and tells its
# exit status over the serial line.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /run
ln -sf /proc/self/fd /dev/fd
mkdir -p /run/lock /var/tmp
ip link set lo up
echo handover-guest >/proc/sys/kernel/hostname
while read -r from to; do
	mkdir -p "$to"
	mount --bind "/payload/$from" "$to"
done </payload/places
sh /payload/run.sh
echo "handover-vm exit $?"
sync
echo o >/proc/sysrq-trigger
sleep 60
