// SPDX-License-Identifier: GPL-2.0
/*
 * race-guest: a vCPU that reads the same pages again and again, while another thread
 * of its process drops and refills them: invalidations in the middle of faults. The
 * guest's code has a slot of its own, which is left alone.
 */
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvm_guest.h"

#define CODE_GPA 0x1000UL
#define GPA 0x10000000UL

static const char usage[] =
	"usage: race-guest [OPTION]...\n"
	"Read pages from a KVM guest while its host drops them; print one JSON line.\n"
	"  --pages N   pages (61)\n"
	"  --rounds N  times that the host drops and refills them all (20)\n"
	"  --pause MS  between two of those (25)\n"
	"  --gap MS    between dropping and refilling (0)\n";

struct host {
	uint8_t *memory;
	uint64_t pages, rounds, pause_ms, gap_ms;
	atomic_bool done;
};

static void *drop_and_refill(void *argument)
{
	struct host *host = argument;

	for (uint64_t round = 0; round < host->rounds; round++) {
		usleep(host->pause_ms * 1000);
		if (madvise(host->memory, host->pages * PAGE, MADV_DONTNEED))
			err(2, "MADV_DONTNEED");
		usleep(host->gap_ms * 1000);
		for (uint64_t page = 0; page < host->pages; page++)
			host->memory[page * PAGE] = 1;
	}
	atomic_store(&host->done, true);
	return NULL;
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "pages", required_argument, NULL, 'n' },
		{ "rounds", required_argument, NULL, 'r' },
		{ "pause", required_argument, NULL, 'p' },
		{ "gap", required_argument, NULL, 'g' },
		{ "help", no_argument, NULL, 'h' },
		{},
	};
	struct host host = { .pages = 61, .rounds = 20, .pause_ms = 25 };
	uint64_t touched = 0, done = 0;
	pthread_t thread;
	int option, error = 0;

	while ((option = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
		switch (option) {
		case 'n': host.pages = strtoull(optarg, NULL, 0); break;
		case 'r': host.rounds = strtoull(optarg, NULL, 0); break;
		case 'p': host.pause_ms = strtoull(optarg, NULL, 0); break;
		case 'g': host.gap_ms = strtoull(optarg, NULL, 0); break;
		case 'h': fputs(usage, stdout); return 0;
		default: fputs(usage, stderr); return 2;
		}
	}
	if (!host.pages)
		errx(2, "pages from 1");
	uint64_t size = host.pages * PAGE;
	void *code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	host.memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (code == MAP_FAILED || host.memory == MAP_FAILED)
		err(2, "mmap");
	madvise(host.memory, size, MADV_NOHUGEPAGE);
	memset(host.memory, 1, size);
	struct guest guest = guest_create();

	guest_code(code, false);
	guest_slot(&guest, 0, CODE_GPA, code, PAGE);
	guest_slot(&guest, 1, GPA, host.memory, size);
	if (pthread_create(&thread, NULL, drop_and_refill, &host))
		errx(2, "no thread");
	while (!error && !atomic_load(&host.done)) {
		error = guest_touch(&guest, CODE_GPA, GPA, host.pages, &done);
		touched += done;
	}
	pthread_join(thread, NULL);
	printf("{\"workload\":\"race-guest\",\"pid\":%d,\"slot\":1,\"gfn\":%lu,\"pages\":%llu,"
	       "\"hva\":%lu,\"rounds\":%llu,\"touched\":%llu,\"errno\":%d}\n",
	       getpid(), GPA / PAGE, (unsigned long long)host.pages, (uintptr_t)host.memory,
	       (unsigned long long)host.rounds, (unsigned long long)touched, error);
	return error ? 1 : 0;
}
