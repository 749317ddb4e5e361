/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Ground for the programs: kernel types without kernel headers, offsets that
 * come from BTF as -D flags, and one way to write a hook whether it is
 * attached as a kprobe or as fentry/fexit.
 *
 * Every O_x is a byte offset, every V_x a run-time value, every HAVE_x a
 * difference between kernels that probes/profile.py detected; no kernel
 * version is compared anywhere.
 */
#ifndef PFNTRACE_H
#define PFNTRACE_H

#include "wire.h"

#ifndef NULL
#define NULL ((void *)0)
#endif
#define inline_fn static __attribute__((always_inline)) inline

/* arch/x86/include/asm/ptrace.h; bcc's own accessors need kernel headers. */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8;
	unsigned long ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};

/* Reads one value of type T at address P; zero where the kernel refuses. */
#define PEEK(T, P)                                                         \
	({                                                                 \
		T v_ = 0;                                                  \
		bpf_probe_read_kernel(&v_, sizeof(v_), (const void *)(P)); \
		v_;                                                        \
	})

/* 7th and later arguments are on the stack, above the return address. */
#define STACK_ARG(ctx, n) PEEK(u64, (ctx)->sp + 8 + 8 * (n))

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

/*
 * Entry points: kp_x is attached as kprobe, kr_x as kretprobe; FENTRY_KVM and
 * FEXIT_KVM make the names that bcc recognises as fentry and fexit of a
 * function of kvm.ko.
 */
#define FENTRY_KVM(sym) CAT(kfunc__kvm__, sym)
#define FEXIT_KVM(sym) CAT(kretfunc__kvm__, sym)

#endif
