// SPDX-License-Identifier: GPL-2.0
/*
 * ttm-guest: give memory of a real TTM driver (qxl) to a KVM guest.
 *
 * A buffer is allocated in video memory and touched; then so many others are that it
 * is evicted to system memory. TTM takes that from non-compound higher-order
 * allocations and maps it VM_PFNMAP: all pages but each block's first have a
 * reference count of 0. The guest then touches every page of the buffer. Up to 6.12
 * KVM_RUN fails with EFAULT on the first tail page; later kernels run them all.
 * Without eviction (--fill 0) the buffer is PCI memory, which has no struct page.
 */
#include <drm/drm.h>
#include <drm/qxl_drm.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvm_guest.h"

#define BUFFER_SIZE (128 * PAGE)
#define FILLER_SIZE (1UL << 20)
#define CODE_GPA 0x1000UL
#define BUFFER_GPA 0x10000000UL

static const char usage[] =
	"usage: ttm-guest [--fill N] [--read] [--rounds N] [--delay S] [--linger S]\n"
	"                 [--expect efault|runs]\n"
	"Touch a buffer of the qxl driver from a KVM guest; print one JSON line.\n"
	"  --fill N     1 MiB buffers that push the first one out of video memory (130)\n"
	"  --read       touch by reading, not by writing\n"
	"  --rounds N   times; in between the slot goes and comes, and all faults with it (1)\n"
	"  --delay S    wait between creating the VM and running it (0)\n"
	"  --linger S   keep the VM that long after the last page (0)\n"
	"  --expect E   make the outcome the exit status: 0 as expected, 1 not\n";

static volatile uint8_t *buffer_create(int drm_fd, uint32_t size)
{
	struct drm_qxl_alloc alloc = { .size = size };
	struct drm_qxl_map map = {};

	if (ioctl(drm_fd, DRM_IOCTL_QXL_ALLOC, &alloc))
		err(2, "DRM_IOCTL_QXL_ALLOC");
	map.handle = alloc.handle;
	if (ioctl(drm_fd, DRM_IOCTL_QXL_MAP, &map))
		err(2, "DRM_IOCTL_QXL_MAP");
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, drm_fd, map.offset);
	if (memory == MAP_FAILED)
		err(2, "mmap of a qxl buffer");
	return memory;
}

static void host_touch(volatile uint8_t *memory, uint64_t size)
{
	for (uint64_t offset = 0; offset < size; offset += PAGE)
		memory[offset] = 1;
}

static volatile uint8_t *buffer_evicted(int fillers)
{
	int drm_fd = open("/dev/dri/card0", O_RDWR | O_CLOEXEC);

	if (drm_fd < 0)
		err(2, "/dev/dri/card0 (run the lab with --device qxl)");
	volatile uint8_t *buffer = buffer_create(drm_fd, BUFFER_SIZE);
	host_touch(buffer, BUFFER_SIZE);
	for (int i = 0; i < fillers; i++)
		host_touch(buffer_create(drm_fd, FILLER_SIZE), FILLER_SIZE);
	host_touch(buffer, BUFFER_SIZE);
	return buffer;
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "fill", required_argument, NULL, 'f' }, { "read", no_argument, NULL, 'r' },
		{ "delay", required_argument, NULL, 'd' },
		{ "rounds", required_argument, NULL, 'R' },
		{ "linger", required_argument, NULL, 'l' },
		{ "expect", required_argument, NULL, 'e' }, { "help", no_argument, NULL, 'h' }, {},
	};
	double delay_s = 0, linger_s = 0;
	const char *expect = NULL;
	bool by_read = false;
	int fillers = 130, rounds = 1, option;
	uint64_t done = 0;

	while ((option = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
		switch (option) {
		case 'f': fillers = atoi(optarg); break;
		case 'r': by_read = true; break;
		case 'R': rounds = atoi(optarg); break;
		case 'd': delay_s = strtod(optarg, NULL); break;
		case 'l': linger_s = strtod(optarg, NULL); break;
		case 'e': expect = optarg; break;
		case 'h': fputs(usage, stdout); return 0;
		default: fputs(usage, stderr); return 2;
		}
	}
	if (expect && strcmp(expect, "efault") && strcmp(expect, "runs"))
		errx(2, "--expect takes efault or runs");
	volatile uint8_t *buffer = buffer_evicted(fillers);
	uint64_t pages = BUFFER_SIZE / PAGE;
	void *code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct guest guest = guest_create();

	guest_code(code, !by_read);
	guest_slot(&guest, 0, CODE_GPA, code, PAGE);
	guest_slot(&guest, 1, BUFFER_GPA, (void *)buffer, BUFFER_SIZE);
	usleep(delay_s * 1e6);
	int error = guest_touch(&guest, CODE_GPA, BUFFER_GPA, pages, &done);
	for (int round = 1; round < rounds && !error; round++) {
		guest_slot(&guest, 1, BUFFER_GPA, (void *)buffer, 0);
		guest_slot(&guest, 1, BUFFER_GPA, (void *)buffer, BUFFER_SIZE);
		error = guest_touch(&guest, CODE_GPA, BUFFER_GPA, pages, &done);
	}
	printf("{\"workload\":\"ttm-guest\",\"pid\":%d,\"vm_fd\":%d,\"slot\":1,\"gpa\":%lu,"
	       "\"gfn\":%lu,\"pages\":%lu,\"hva\":%lu,\"code_gfn\":%lu,\"access\":\"%s\","
	       "\"fillers\":%d,\"ran\":%lu,\"errno\":%d,\"outcome\":\"%s\"",
	       getpid(), guest.vm_fd, BUFFER_GPA, BUFFER_GPA / PAGE, pages, (uintptr_t)buffer,
	       CODE_GPA / PAGE, by_read ? "read" : "write", fillers, done,
	       error, error == EFAULT ? "efault" : error ? "other" : "runs");
	if (error)
		printf(",\"failed_gfn\":%lu", BUFFER_GPA / PAGE + done);
	puts("}");
	fflush(stdout);
	usleep(linger_s * 1e6);
	return expect && strcmp(expect, error == EFAULT ? "efault" : error ? "other" : "runs");
}
