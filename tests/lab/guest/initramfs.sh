#!/bin/busybox sh
# First program of a lab guest: load the four modules that reach the disks, mount
# them by their serial numbers, hand over to init.sh of the run's own disk.
# shellcheck shell=dash

B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev

while read -r module; do
	$B insmod "/modules/$module" || echo "lab: insmod $module failed"
done </modules/order

# mount_disk SERIAL FOLDER OPTIONS: the disk that QEMU calls SERIAL.
mount_disk() {
	for disk in /sys/block/vd*; do
		serial=$($B cat "$disk/serial")
		if [ "$serial" = "$1" ]; then
			$B mkdir -p "$2"
			$B mount -t ext4 -o "$3" "/dev/${disk##*/}" "$2"
			return
		fi
	done
	echo "lab: no disk $1"
	return 1
}

if ! {
	mount_disk root /new rw,noatime &&
		mount_disk modules "/new/usr/lib/modules/$($B uname -r)" rw,noatime &&
		mount_disk workloads /new/opt/lab ro &&
		mount_disk run /new/lab ro &&
		mount_disk out /new/out rw,noatime
}; then
	echo "lab: initramfs: cannot mount the disks"
	echo b >/proc/sysrq-trigger
fi

for folder in proc sys dev; do
	$B mount -o move "/$folder" "/new/$folder"
done
exec $B switch_root /new /lab/init.sh
