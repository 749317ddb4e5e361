// SPDX-License-Identifier: GPL-2.0
/*
 * Linked into each KVM selftest with -Wl,--wrap=close,--wrap=ioctl.
 *
 * The statistics: when the environment has
 * KVM_STATS_JSON=FILE, append to FILE one JSON line with KVM's own statistics for
 * each VM and vCPU, just before its fd is closed, or at exit if it never is.
 *
 * {"fd_kind":"vm"|"vcpu","pid":N,"fd":N,"stats":{...}}
 *
 * What a VM maps is gone by then: the selftests delete their slots first.  So FILE.mapped gets
 * the VM's statistics as they are before each slot is deleted, with the time (CLOCK_MONOTONIC):
 *
 * {"ts":NS,"pid":N,"fd":N,"stats":{...}}
 *
 * The slots: the selftests insist on KVM_SET_USER_MEMORY_REGION2, which is Linux
 * bb58b90b1a8f ("KVM: Introduce KVM_SET_USER_MEMORY_REGION2") (v6.8). Older kernels
 * get the first ioctl of that name instead, whose struct is the start of the second.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <time.h>

#include "kvm_stats.h"

int __real_close(int fd);
int __wrap_close(int fd);

/* "vm", "vcpu" or NULL, by the name of the anonymous inode behind fd. */
static const char *fd_kind(int fd)
{
	char path[64], target[64] = "";

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	if (readlink(path, target, sizeof(target) - 1) < 0)
		return NULL;
	if (!strncmp(target, "anon_inode:kvm-vcpu-stats", 25) ||
	    !strncmp(target, "anon_inode:kvm-vm-stats", 23))
		return NULL;
	if (!strncmp(target, "anon_inode:kvm-vcpu", 19))
		return "vcpu";
	return !strncmp(target, "anon_inode:kvm-vm", 17) ? "vm" : NULL;
}

/* One write, so that threads which close at once do not mix their lines. */
static void append(const char *name, const char *text, size_t size)
{
	int out = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);

	if (out < 0 || write(out, text, size) != (ssize_t)size)
		perror(name);
	if (out >= 0)
		__real_close(out);
}

static void report(int fd)
{
	const char *name = getenv("KVM_STATS_JSON");
	const char *kind = name ? fd_kind(fd) : NULL;
	char *text = NULL;
	size_t size = 0;

	if (!kind)
		return;
	FILE *line = open_memstream(&text, &size);
	if (!line)
		return;
	fprintf(line, "{\"fd_kind\":\"%s\",\"pid\":%d,\"fd\":%d,\"stats\":", kind, getpid(), fd);
	kvm_stats_json(line, fd);
	fputs("}\n", line);
	fclose(line);

	append(name, text, size);
	free(text);
}

static void report_mapped(int fd)
{
	const char *name = getenv("KVM_STATS_JSON");
	struct timespec now;
	char *text = NULL, path[4096];
	size_t size = 0;

	if (!name || snprintf(path, sizeof(path), "%s.mapped", name) >= (int)sizeof(path))
		return;
	FILE *line = open_memstream(&text, &size);
	if (!line)
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	fprintf(line, "{\"ts\":%lld,\"pid\":%d,\"fd\":%d,\"stats\":",
		now.tv_sec * 1000000000LL + now.tv_nsec, getpid(), fd);
	kvm_stats_json(line, fd);
	fputs("}\n", line);
	fclose(line);
	append(path, text, size);
	free(text);
}

int __wrap_close(int fd)
{
	report(fd);
	return __real_close(fd);
}

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list list;

	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	if (request == KVM_SET_USER_MEMORY_REGION2 || request == KVM_SET_USER_MEMORY_REGION) {
		/* The first ioctl's struct is the start of the second's; a size of 0 deletes. */
		const struct kvm_userspace_memory_region *region = argument;

		if (!region->memory_size)
			report_mapped(fd);
	}
	int result = __real_ioctl(fd, request, argument);

	if (request == KVM_CHECK_EXTENSION && argument == (void *)KVM_CAP_USER_MEMORY2)
		return 1;
	if (request != KVM_SET_USER_MEMORY_REGION2 || result >= 0 || errno != ENOTTY)
		return result;
	return __real_ioctl(fd, KVM_SET_USER_MEMORY_REGION, argument);
}

static void __attribute__((destructor)) report_rest(void)
{
	DIR *fds = opendir("/proc/self/fd");
	struct dirent *entry;

	while (fds && (entry = readdir(fds)))
		if (entry->d_name[0] != '.')
			report(atoi(entry->d_name));
}
