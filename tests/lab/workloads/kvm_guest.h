/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The smallest useful KVM guest: 32-bit protected mode, no paging, one vCPU, and a
 * loop that touches one byte in each of `count` consecutive pages, then halts.
 * It works with nested paging and with the shadow MMU.
 */
#ifndef LAB_KVM_GUEST_H
#define LAB_KVM_GUEST_H

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
/* Where in a page the loop touches: past the code, should it be in that page. */
#define TOUCH_OFFSET 2048

struct guest {
	int vm_fd;
	int vcpu_fd;
	struct kvm_run *run;
};

static const uint8_t touch_by_write[] = {
	0xc6, 0x07, 0x2a,			/* 1: movb $42, (%edi)	*/
	0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,	/* add $4096, %edi	*/
	0x49,					/* dec %ecx		*/
	0x75, 0xf4,				/* jnz 1b		*/
	0xf4,					/* hlt			*/
};

static const uint8_t touch_by_read[] = {
	0x8a, 0x07,				/* 1: movb (%edi), %al	*/
	0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,	/* add $4096, %edi	*/
	0x49,					/* dec %ecx		*/
	0x75, 0xf5,				/* jnz 1b		*/
	0xf4,					/* hlt			*/
};

static inline void guest_code(void *page, bool by_write)
{
	if (by_write)
		memcpy(page, touch_by_write, sizeof(touch_by_write));
	else
		memcpy(page, touch_by_read, sizeof(touch_by_read));
}

static inline struct guest guest_create(void)
{
	struct guest guest = { .vm_fd = -1, .vcpu_fd = -1 };
	struct kvm_sregs sregs;
	int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (kvm_fd < 0)
		err(2, "/dev/kvm");
	guest.vm_fd = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	if (guest.vm_fd < 0)
		err(2, "KVM_CREATE_VM");
	guest.vcpu_fd = ioctl(guest.vm_fd, KVM_CREATE_VCPU, 0);
	if (guest.vcpu_fd < 0)
		err(2, "KVM_CREATE_VCPU");
	int run_size = ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	guest.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, guest.vcpu_fd, 0);
	if (guest.run == MAP_FAILED)
		err(2, "mmap of the vCPU");
	close(kvm_fd);

	if (ioctl(guest.vcpu_fd, KVM_GET_SREGS, &sregs))
		err(2, "KVM_GET_SREGS");
	struct kvm_segment flat = {
		.limit = 0xffffffff, .selector = 8, .present = 1,
		.s = 1, .g = 1, .db = 1, .type = 3,
	};
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	flat.type = 11;
	sregs.cs = flat;
	sregs.cr0 |= 1;		/* protected mode */
	if (ioctl(guest.vcpu_fd, KVM_SET_SREGS, &sregs))
		err(2, "KVM_SET_SREGS");
	return guest;
}

static inline void guest_slot(struct guest *guest, uint32_t slot, uint64_t gpa, void *hva,
			      uint64_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)hva,
	};

	if (ioctl(guest->vm_fd, KVM_SET_USER_MEMORY_REGION, &region))
		err(2, "KVM_SET_USER_MEMORY_REGION");
}

/*
 * Run the code at code_gpa over count pages from gpa. Return 0, or the errno of
 * KVM_RUN, or EPROTO if the guest ended in any other way than by its hlt; *done is
 * the number of pages it got through.
 */
static inline int guest_touch(struct guest *guest, uint64_t code_gpa, uint64_t gpa,
			      uint64_t count, uint64_t *done)
{
	struct kvm_regs regs = {
		.rip = code_gpa, .rflags = 2, .rdi = gpa + TOUCH_OFFSET, .rcx = count,
	};
	int error;

	if (ioctl(guest->vcpu_fd, KVM_SET_REGS, &regs))
		err(2, "KVM_SET_REGS");
	do {
		error = ioctl(guest->vcpu_fd, KVM_RUN, 0) ? errno : 0;
	} while (error == EINTR || error == EAGAIN);
	if (!error && guest->run->exit_reason != KVM_EXIT_HLT) {
		warnx("the guest exited with reason %u", guest->run->exit_reason);
		error = EPROTO;
	}
	if (ioctl(guest->vcpu_fd, KVM_GET_REGS, &regs))
		err(2, "KVM_GET_REGS");
	*done = count - regs.rcx;
	return error;
}

#endif
