// SPDX-License-Identifier: GPL-2.0
/*
 * pages-guest: give memory of /dev/lab-pages (modules/lab_pages.c) to a KVM guest: a block of a
 * higher order that is not compound, whose pages but the first nobody counts. Up to
 * 6.12 KVM_RUN fails with EFAULT on the second page; later kernels run them all.
 * The guest only reads, so that nothing is overwritten when the block is freed.
 * With --vmcb it does not touch the pages: it runs VMRUN with the block's second page
 * as VMCB, which KVM maps for itself by kvm_vcpu_map(). KVM finds nothing valid in it and says
 * so there (SVM_EXIT_ERR), or refuses the page: then the guest gets #GP, and dies.
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
	"  --vmcb E      run VMRUN with one of them; exit with 0 if E, runs or refused, came true\n"
	"  --linger S    keep the VM that long at the end (0)\n";

static void order(int fd, const char *words)
{
	if (write(fd, words, strlen(words)) < 0)
		err(2, "/dev/lab-pages: %s", words);
}

/* The pfn of the block's first page. */
static uint64_t first_pfn(int fd)
{
	char words[32] = "";

	if (read(fd, words, sizeof(words) - 1) < 0)
		err(2, "/dev/lab-pages");
	return strtoull(words, NULL, 10);
}

/* A guest with paging and SVM on, as VMRUN demands: 4 MiB from 0 map themselves. */
static void guest_with_svm(struct guest *guest, uint8_t *code)
{
	static const uint8_t run[] = { 0x0f, 0x01, 0xd8, /* vmrun */ 0xf4 /* hlt */ };
	static const uint32_t self = 0x83; /* present, writable, 4 MiB */
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };
	/* Where VMRUN saves the host's state: MSR_VM_HSAVE_PA, which must be set. */
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} save = { .head.nmsrs = 1, .entry = { .index = 0xc0010117, .data = CODE_GPA + PAGE } };
	struct kvm_sregs sregs;
	int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	memcpy(code, run, sizeof(run));
	memcpy(code + PAGE, &self, sizeof(self));
	if (kvm_fd < 0 || ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, &cpuid))
		err(2, "KVM_GET_SUPPORTED_CPUID");
	close(kvm_fd);
	if (ioctl(guest->vcpu_fd, KVM_SET_CPUID2, &cpuid))
		err(2, "KVM_SET_CPUID2");
	if (ioctl(guest->vcpu_fd, KVM_GET_SREGS, &sregs))
		err(2, "KVM_GET_SREGS");
	sregs.cr3 = CODE_GPA + PAGE;
	sregs.cr4 |= 0x10;	 /* PSE */
	sregs.cr0 |= 0x80000000; /* PG */
	sregs.efer |= 0x1000;	 /* SVME */
	sregs.idt.limit = 0;	 /* any exception is its last */
	if (ioctl(guest->vcpu_fd, KVM_SET_SREGS, &sregs))
		err(2, "KVM_SET_SREGS");
	if (ioctl(guest->vcpu_fd, KVM_SET_MSRS, &save) != 1)
		err(2, "KVM_SET_MSRS");
}

/* Does KVM take the page at GPA + PAGE, of which memory is the block, for a VMCB? */
static const char *try_vmcb(struct guest *guest, const volatile uint8_t *memory)
{
	struct kvm_regs regs = { .rip = CODE_GPA, .rflags = 2, .rax = GPA + PAGE };

	if (ioctl(guest->vcpu_fd, KVM_SET_REGS, &regs))
		err(2, "KVM_SET_REGS");
	if (ioctl(guest->vcpu_fd, KVM_RUN, 0))
		err(2, "KVM_RUN");
	/* The exit code's place in a VMCB. */
	bool written = *(const volatile int32_t *)(memory + PAGE + 0x70) == -1;
	if (guest->run->exit_reason == KVM_EXIT_HLT && written)
		return "runs";
	return guest->run->exit_reason == KVM_EXIT_SHUTDOWN && !written ? "refused" : "other";
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "pages", required_argument, NULL, 'n' }, { "read-only", no_argument, NULL, 'r' },
		{ "free", no_argument, NULL, 'f' },	   { "hold", no_argument, NULL, 'o' },
		{ "vmcb", required_argument, NULL, 'v' },
		{ "linger", required_argument, NULL, 'l' }, { "help", no_argument, NULL, 'h' }, {},
	};
	bool read_only = false, free_them = false, hold = false;
	uint64_t pages = 16, done = 0, again = 0;
	const char *vmcb = NULL, *outcome = "";
	double linger_s = 0;
	int option, error;

	while ((option = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
		switch (option) {
		case 'n': pages = strtoull(optarg, NULL, 0); break;
		case 'r': read_only = true; break;
		case 'f': free_them = true; break;
		case 'o': hold = true; break;
		case 'v': vmcb = optarg; break;
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
	void *code = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || code == MAP_FAILED)
		err(2, "mmap");
	if (hold) {
		char words[64];

		madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
		memset(memory, 1, pages * PAGE);
		snprintf(words, sizeof(words), "hold %lu %u", (uintptr_t)memory, (unsigned)pages);
		order(fd, words);
	}
	uint64_t pfn = first_pfn(fd);
	struct guest guest = guest_create();

	guest_code(code, false);
	guest_slot(&guest, 0, CODE_GPA, code, 2 * PAGE);
	guest_slot(&guest, 1, GPA, memory, pages * PAGE);
	if (vmcb) {
		guest_with_svm(&guest, code);
		outcome = try_vmcb(&guest, memory);
		error = 0;
	} else {
		error = guest_touch(&guest, CODE_GPA, GPA, pages, &done);
	}
	if (free_them) {
		order(fd, "free");
		guest_touch(&guest, CODE_GPA, GPA, done, &again);
	}
	printf("{\"workload\":\"pages-guest\",\"pid\":%d,\"slot\":1,\"gfn\":%lu,\"pages\":%lu,"
	       "\"pfn\":%lu,\"hva\":%lu,\"ran\":%lu,\"freed\":%s,\"held\":%s,\"errno\":%d,"
	       "\"vmcb\":\"%s\",\"exit\":%u}\n",
	       getpid(), GPA / PAGE, pages, pfn, (uintptr_t)memory, done,
	       free_them ? "true" : "false", hold ? "true" : "false", error,
	       outcome, vmcb ? guest.run->exit_reason : 0);
	fflush(stdout);
	usleep(linger_s * 1e6);
	return vmcb && strcmp(vmcb, outcome);
}
