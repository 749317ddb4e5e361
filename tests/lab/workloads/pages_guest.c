// SPDX-License-Identifier: GPL-2.0
/*
 * pages-guest: give memory of /dev/lab-pages (modules/lab_pages.c) to a KVM guest: a block of a
 * higher order that is not compound, whose pages but the first nobody counts. Up to
 * 6.12 KVM_RUN fails with EFAULT on the second page; later kernels run them all.
 * The guest only reads, so that nothing is overwritten when the block is freed.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvm_guest.h"

#define CODE_GPA 0x1000UL
#define GPA 0x10000000UL

static const char usage[] =
	"usage: pages-guest [OPTION]...\n"
	"Touch pages of /dev/lab-pages from a KVM guest; print one JSON line.\n"
	"  --pages N     pages of the block (16)\n"
	"  --read-only   map them without write permission\n"
	"  --free        have the driver free them while the guest maps them; read again\n"
	"  --hold        the guest gets anonymous memory, of which the driver holds each page\n"
	"  --linger S    keep the VM that long at the end (0)\n";

static void order(int fd, const char *words)
{
	if (write(fd, words, strlen(words)) < 0)
		err(2, "/dev/lab-pages: %s", words);
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "pages", required_argument, NULL, 'n' }, { "read-only", no_argument, NULL, 'r' },
		{ "free", no_argument, NULL, 'f' },	   { "hold", no_argument, NULL, 'o' },
		{ "linger", required_argument, NULL, 'l' }, { "help", no_argument, NULL, 'h' }, {},
	};
	bool read_only = false, free_them = false, hold = false;
	uint64_t pages = 16, done = 0, again = 0;
	double linger_s = 0;
	int option, error;

	while ((option = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
		switch (option) {
		case 'n': pages = strtoull(optarg, NULL, 0); break;
		case 'r': read_only = true; break;
		case 'f': free_them = true; break;
		case 'o': hold = true; break;
		case 'l': linger_s = strtod(optarg, NULL); break;
		case 'h': fputs(usage, stdout); return 0;
		default: fputs(usage, stderr); return 2;
		}
	}
	int fd = open("/dev/lab-pages", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		err(2, "/dev/lab-pages (run the lab with --module lab_pages)");
	int protection = read_only ? PROT_READ : PROT_READ | PROT_WRITE;
	uint8_t *memory = hold ? mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
				      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) :
				 mmap(NULL, pages * PAGE, protection, MAP_SHARED, fd, 0);
	void *code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || code == MAP_FAILED)
		err(2, "mmap");
	if (hold) {
		char words[64];

		madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
		memset(memory, 1, pages * PAGE);
		snprintf(words, sizeof(words), "hold %lu %u", (uintptr_t)memory, (unsigned)pages);
		order(fd, words);
	}
	struct guest guest = guest_create();

	guest_code(code, false);
	guest_slot(&guest, 0, CODE_GPA, code, PAGE);
	guest_slot(&guest, 1, GPA, memory, pages * PAGE);
	error = guest_touch(&guest, CODE_GPA, GPA, pages, &done);
	if (free_them) {
		order(fd, "free");
		guest_touch(&guest, CODE_GPA, GPA, done, &again);
	}
	printf("{\"workload\":\"pages-guest\",\"pid\":%d,\"slot\":1,\"gfn\":%lu,\"pages\":%lu,"
	       "\"hva\":%lu,\"ran\":%lu,\"freed\":%s,\"held\":%s,\"errno\":%d}\n",
	       getpid(), GPA / PAGE, pages, (uintptr_t)memory, done, free_them ? "true" : "false",
	       hold ? "true" : "false", error);
	fflush(stdout);
	usleep(linger_s * 1e6);
	return 0;
}
