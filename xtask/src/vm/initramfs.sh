#!/bin/busybox sh
# First program of a guest: loads what reaches the disks, mounts them, and goes over to guest.sh.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do
	insmod "/modules/$module" || echo "handover-vm note: module $module"
done </modules/order
mount -t ext4 /dev/vda /root || echo o >/proc/sysrq-trigger
mount -t ext4 /dev/vdb /root/payload || echo o >/proc/sysrq-trigger
mount -t ext4 -o ro /dev/vdc /root/lib/modules || echo o >/proc/sysrq-trigger
mount --move /dev /root/dev
umount /proc
exec switch_root /root /handover/guest.sh
