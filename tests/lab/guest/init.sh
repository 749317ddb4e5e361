#!/bin/sh
# Process 1 of a lab guest: finish the mounts, load KVM, run the one command of
# this run, report over virtio-serial. The run's disk holds, beside this file,
# `options` (shell assignments) and `command.sh`.
#
# Ports: lab.stdout and lab.stderr carry the command's output, nothing else.
# lab.control carries one message a line: from here `ready`, `exit N`, `done`;
# to here `stop` (end the command now; /out is wanted all the same).

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/lab/bin:/opt/lab/bin
export HOME=/root LANG=C.UTF-8 TERM=dumb

LAB_KVM=1 LAB_NPT='' LAB_DEVICE=''
# shellcheck source=/dev/null
. /lab/options

mount_all() {
	mount -t securityfs securityfs /sys/kernel/security
	mount -t tracefs tracefs /sys/kernel/tracing
	mount -t debugfs debugfs /sys/kernel/debug
	mount -t bpf bpf /sys/fs/bpf
	mkdir -p /dev/pts /dev/shm
	mount -t devpts devpts /dev/pts
	ln -sf /proc/self/fd /dev/fd
	for folder in /tmp /run /dev/shm; do
		mount -t tmpfs -o mode=1777 tmpfs "$folder"
	done
	mount --bind /lab/project /project
	hostname lab
	ip link set lo up
	rmdir /out/lost+found
	ln -s "/lib/modules/$(uname -r)/config" "/boot/config-$(uname -r)"
}

# port NAME: the device of the virtio-serial port NAME (there is no udev here).
port() {
	for entry in /sys/class/virtio-ports/*; do
		read -r name <"$entry/name"
		[ "$name" = "$1" ] && echo "/dev/${entry##*/}" && return
	done
	echo "lab: no port $1" >/dev/console
	return 1
}

load_modules() {
	# A changed KVM takes the place of the kernel's own; this disk forgets it.
	if [ -e /lab/kvm/kvm.ko ]; then
		cp /lab/kvm/*.ko "/lib/modules/$(uname -r)/kernel/arch/x86/kvm/"
	fi
	if [ "$LAB_KVM" = 1 ]; then
		modprobe kvm_amd ${LAB_NPT:+npt=$LAB_NPT} || echo "lab: kvm_amd does not load"
	fi
	for module in /lab/modules/*.ko; do
		[ ! -e "$module" ] || insmod "$module" || echo "lab: $module does not load"
	done
	[ -z "$LAB_DEVICE" ] || modprobe "$LAB_DEVICE" || echo "lab: $LAB_DEVICE does not load"
}

# Wait for `stop` and end the command's session: politely, then not. When the
# port closes, the lab itself is gone: power off.
obey() {
	while read -r order <&3; do
		[ "$order" = stop ] || continue
		kill -TERM "-$1"
		sleep 5
		kill -KILL "-$1"
	done
	echo o >/proc/sysrq-trigger
}

mount_all >/dev/console 2>&1
load_modules >/dev/console 2>&1
exec 3<>"$(port lab.control)"
stdout=$(port lab.stdout)
stderr=$(port lab.stderr)

echo ready >&3
cd /out || exit
setsid sh /lab/command.sh </dev/null >"$stdout" 2>"$stderr" 3>&- &
command=$!
obey "$command" 2>/dev/null &
wait "$command"
echo "exit $?" >&3

cd /
kill -KILL -1
sync
umount /out 2>/dev/null || mount -o remount,ro /out 2>/dev/null
sync
echo "done" >&3
while :; do sleep 60; done
