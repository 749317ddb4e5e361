/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the maps of pfntrace.bpf.c hold: settings, VMs, one entry per thread,
 * counters, pages.
 */
#ifndef PFNTRACE_STATE_H
#define PFNTRACE_STATE_H

struct config {
	u64 gfn_lo; /* --gfn: records outside are filtered */
	u64 gfn_hi;
	u32 armed;  /* no probe does anything before this is 1 */
	u32 n_pids; /* --vm: number of entries in pids, 0 = all VMs */
	u32 next_vm;
	u32 bit_clearers; /* threads that age or clean SPTEs right now */
};

struct vm_entry {
	u32 id;
	u32 tgid;
	u32 traced;
	u32 created; /* 1: its VM create record was written */
};

/* Loss accounting: produced = written + lost + filtered, per cpu and kind. */
struct kind_counts {
	u64 produced;
	u64 lost;     /* ring full */
	u64 filtered; /* --vm, --gfn */
	u64 torn;     /* its end was missed (kretprobe instances ran out); counted in lost too */
};

/* An event on its way to finish_event(), in scratch space. */
struct pending {
	struct event_record e;
	u64 kvm; /* whose event: 0 if the header says it, or nobody knows */
	u32 kind;
	u32 op;
	u32 flags;
	u32 pad;
};

/*
 * One thread's open fault and the reasons it is inside.  Never deleted, so
 * that a fault costs no insert and no delete; the map is an LRU.
 */
struct thread_state {
	struct fault_record rec; /* filled as the fault proceeds */
	u64 fault;		 /* struct kvm_page_fault, 0: no fault open */
	u64 kvm;		 /* VM of the fault or of the innermost reason */
	u64 causes;		 /* stack of enum spte_cause, innermost in the low nibble */
	u64 arg;		 /* notifier callback at work: its range ... */
	u64 arg2;		 /* ... and its VM */
	u64 pin_what;		 /* kvm_vcpu_map() or refresh at work: map or gpc ... */
	u64 pin_who;		 /* ... and vcpu or kvm */
	u64 unpin_kvm;		 /* kvm_vcpu_unmap() at work: its VM */
	u64 dying;		 /* VM whose kvm_arch_destroy_vm() runs here */
	u64 walk;		 /* struct follow_pfnmap_args while the walk runs */
	u64 last_vma;		 /* the VMA of the last walk: a VMA record was written */
	u64 set_sptep;		 /* mmu_set_spte() at work on this entry ... */
	u64 set_old;		 /* ... which held this */
	u64 set_gfn;
	u64 set_prefetch;
	u64 released_pfn; /* to see one put once, see on_release() */
	s32 released_count;
	u32 released_call;
	u32 vm;
	u64 last_slot;
	struct pending pending; /* what a tracepoint's program writes for this thread */
};

#define PENDING_PAGE 1	/* read the state of e.pfn */
#define PENDING_MARK 2	/* e.pfn is mapped into a guest now */
#define PENDING_GFN 4	/* --gfn applies */
#define PENDING_CAUSE 8 /* e.cause: the thread's reason if none is given */
#define PENDING_WAKE 16 /* the recorder must look at once */

/* One page tracepoint on one cpu: see page_call(). */
struct page_call {
	u64 last;
	u64 rescued;
};

/*
 * Entries of raw_tails, for programs of raw tracepoints; the first two number
 * page_calls.  Each has one caller: since 6.13 a program's stack may be one
 * private area per cpu (bpf_enable_private_stack(), kernel/bpf/verifier.c),
 * and the kernel keeps only what is attached from running inside itself, not
 * what it calls.  So the same function is loaded once for each caller.
 */
#define RAW_TAIL_FREE 0
#define RAW_TAIL_ALLOC 1
#define RAW_TAIL_FREE_AGAIN 2
#define RAW_TAIL_ALLOC_AGAIN 3
#define RAW_TAIL_CHANGED 4
#define RAW_TAIL_FAST 5
#define RAW_TAILS 6

/* Two bytes for every page of the host: its state in bits 1:0, above it the last VM. */
#define PAGE_CHUNK 4096
struct page_chunk {
	u16 w[PAGE_CHUNK];
};
#define PAGE_MAPPED 1 /* mapped into a guest since it was last freed */
#define PAGE_FREED 2  /* freed after that, not yet handed out again */
#define PAGE_STATE 3
#define PAGE_VM_SHIFT 2
#define PAGE_VM_MAX (0xffff >> PAGE_VM_SHIFT)
#define PAGE_LANES 0x0001000100010001ULL /* the four pages of one word */

#define RB_NO_WAKEUP 1
#define RB_FORCE_WAKEUP 2

#endif
