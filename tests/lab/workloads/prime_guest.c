// SPDX-License-Identifier: GPL-2.0
/*
 * prime-guest: a KVM guest that touches a prime number of known pages, once each
 * and round. Each page costs one guest page fault, so a tracer must show exactly
 * pages * rounds of them, in the range that this program prints. The first page
 * holds the guest's code: fetching it is its fault.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvm_guest.h"
#include "kvm_stats.h"

#define VMS_MAX 64
#define HUGE (2UL << 20)

struct options {
	uint64_t pages, base, rounds, vms;
	double delay_s, linger_s;
	bool by_read, prefault, huge, stats;
};

static const char usage[] =
	"usage: prime-guest [OPTION]...\n"
	"Touch pages from a KVM guest; print one JSON line per VM.\n"
	"  --pages N      pages of the one memslot, all touched (239)\n"
	"  --base GPA     where the memslot begins (0x100000)\n"
	"  --read         touch by reading (the zero page answers), not by writing\n"
	"  --prefault     let the host touch each page first\n"
	"  --huge         memory of 2 MiB pages; base and pages in multiples of that\n"
	"  --repeat N     rounds; after each the host drops all pages (1)\n"
	"  --vms N        that many VMs, one after the other, alive to the end (1)\n"
	"  --delay S      wait between creating the VMs and running them (0)\n"
	"  --linger S     keep the VMs that long after the last page (0)\n"
	"  --print-stats  add KVM's own statistics\n";

static struct options parse(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "pages", required_argument, NULL, 'n' },
		{ "base", required_argument, NULL, 'b' },
		{ "read", no_argument, NULL, 'r' },
		{ "prefault", no_argument, NULL, 'p' },
		{ "huge", no_argument, NULL, 'H' },
		{ "repeat", required_argument, NULL, 'R' },
		{ "vms", required_argument, NULL, 'v' },
		{ "delay", required_argument, NULL, 'd' },
		{ "linger", required_argument, NULL, 'l' },
		{ "print-stats", no_argument, NULL, 's' },
		{ "help", no_argument, NULL, 'h' },
		{},
	};
	struct options options = { .pages = 239, .base = 0x100000, .rounds = 1, .vms = 1 };
	int option;

	while ((option = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
		switch (option) {
		case 'n': options.pages = strtoull(optarg, NULL, 0); break;
		case 'b': options.base = strtoull(optarg, NULL, 0); break;
		case 'r': options.by_read = true; break;
		case 'p': options.prefault = true; break;
		case 'H': options.huge = true; break;
		case 'R': options.rounds = strtoull(optarg, NULL, 0); break;
		case 'v': options.vms = strtoull(optarg, NULL, 0); break;
		case 'd': options.delay_s = strtod(optarg, NULL); break;
		case 'l': options.linger_s = strtod(optarg, NULL); break;
		case 's': options.stats = true; break;
		case 'h': fputs(usage, stdout); exit(0);
		default: fputs(usage, stderr); exit(2);
		}
	}
	if (!options.pages || options.base % PAGE || !options.vms || options.vms > VMS_MAX ||
	    options.base + options.pages * PAGE > 1ULL << 32)
		errx(2, "pages from 1, base on a page, all below 4 GiB, at most %d VMs", VMS_MAX);
	if (options.huge && (options.base % HUGE || options.pages * PAGE % HUGE))
		errx(2, "--huge needs base and pages in multiples of 2 MiB");
	return options;
}

static void *memory_create(const struct options *options)
{
	uint64_t size = options->pages * PAGE, align = options->huge ? HUGE : PAGE;
	uint8_t *memory = mmap(NULL, size + align, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		err(2, "mmap of %llu pages", (unsigned long long)options->pages);
	memory += -(uintptr_t)memory % align;
	madvise(memory, size, options->huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return memory;
}

/* Run all rounds of one VM and print its line. Returns 0 or an errno. */
static int run(struct guest *guest, uint8_t *memory, const struct options *options)
{
	uint64_t touched = 0, done = 0, size = options->pages * PAGE;
	int error = 0;

	for (uint64_t round = 0; round < options->rounds && !error; round++) {
		if (round && madvise(memory, size, MADV_DONTNEED))
			err(2, "MADV_DONTNEED");
		for (uint64_t page = 0; options->prefault && page < options->pages; page++)
			memory[page * PAGE] = 1;
		guest_code(memory, !options->by_read);
		error = guest_touch(guest, options->base, options->base, options->pages, &done);
		touched += done;
	}
	printf("{\"workload\":\"prime-guest\",\"pid\":%d,\"vm_fd\":%d,\"slot\":0,\"gpa\":%llu,"
	       "\"gfn\":%llu,\"pages\":%llu,\"hva\":%llu,\"access\":\"%s\",\"prefault\":%s,"
	       "\"rounds\":%llu,\"touched\":%llu,\"errno\":%d",
	       getpid(), guest->vm_fd, (unsigned long long)options->base,
	       (unsigned long long)(options->base / PAGE), (unsigned long long)options->pages,
	       (unsigned long long)(uintptr_t)memory, options->by_read ? "read" : "write",
	       options->prefault ? "true" : "false", (unsigned long long)options->rounds,
	       (unsigned long long)touched, error);
	if (options->stats) {
		fputs(",\"stats\":{\"vm\":", stdout);
		kvm_stats_json(stdout, guest->vm_fd);
		fputs(",\"vcpu\":", stdout);
		kvm_stats_json(stdout, guest->vcpu_fd);
		fputs("}", stdout);
	}
	puts("}");
	fflush(stdout);
	return error;
}

int main(int argc, char **argv)
{
	struct options options = parse(argc, argv);
	struct guest guests[VMS_MAX];
	void *memories[VMS_MAX];
	int error = 0;

	for (uint64_t vm = 0; vm < options.vms; vm++) {
		guests[vm] = guest_create();
		memories[vm] = memory_create(&options);
		guest_slot(&guests[vm], 0, options.base, memories[vm], options.pages * PAGE);
	}
	usleep(options.delay_s * 1e6);
	for (uint64_t vm = 0; vm < options.vms && !error; vm++)
		error = run(&guests[vm], memories[vm], &options);
	usleep(options.linger_s * 1e6);
	return error ? 1 : 0;
}
