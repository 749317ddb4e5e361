/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The records that the probes write: fixed size, little endian, multiples of
 * eight.  probes/wire.py declares the same layout for numpy;
 * tests/unit/test_wire.py compiles this file and compares every offset.
 *
 * Two sizes only, so that a ring holds records of one stride and a reader can
 * lay an array over it: FAULT records go to wide rings, all others to narrow
 * ones.
 */
#ifndef PFNTRACE_WIRE_H
#define PFNTRACE_WIRE_H

enum record_kind {
	KIND_FAULT = 1,	     /* end of one guest page fault */
	KIND_SPTE = 2,	     /* one leaf SPTE installed, changed or zapped */
	KIND_RELEASE = 3,    /* KVM gives a page reference back, or marks the page */
	KIND_INVALIDATE = 4, /* mmu notifier range start or end */
	KIND_PAGE_FREE = 5,  /* a page that a traced VM maps or mapped is freed */
	KIND_PAGE_ALLOC = 6, /* ... and handed out again */
	KIND_PIN = 7,	     /* kvm_vcpu_map, kvm_vcpu_unmap, pfncache refresh */
	KIND_SLOT = 8,	     /* memslot created, deleted, moved, reflagged, seen */
	KIND_VM = 9,	     /* VM created, destroyed, seen */
	KIND_VMA = 10,	     /* a PFNMAP mapping that a fault walked through, at first sight */
	KIND_MAX = 11,
};

/* Why an SPTE changed: the innermost reason known for the running thread. */
enum spte_cause {
	CAUSE_OTHER = 0,
	CAUSE_FAULT = 1,
	CAUSE_PREFETCH = 2,
	CAUSE_NOTIFIER = 3,
	CAUSE_AGING = 4,
	CAUSE_SLOT = 5,
	CAUSE_DIRTY_LOG = 6,
	CAUSE_RECOVERY = 7, /* NX huge page recovery */
	CAUSE_TEARDOWN = 8,
	CAUSE_ROOT = 9,		/* an invalidated root is being emptied */
	CAUSE_GUEST_WRITE = 10, /* guest wrote to a page table that KVM shadows */
	CAUSE_FAST = 11,	/* lockless permission upgrade, fast_page_fault() */
};

enum mmu_flavour {
	MMU_TDP = 1,	/* the TDP MMU: two-dimensional paging */
	MMU_SHADOW = 2, /* the shadow MMU, also used for nested guests */
};

/* How KVM gave a page back; MARK_* give nothing back but touch struct page. */
enum release_call {
	CALL_PFN_CLEAN = 1,
	CALL_PFN_DIRTY = 2,
	CALL_PAGE_CLEAN = 3,
	CALL_PAGE_DIRTY = 4,
	CALL_FINISH_FAULT = 5,
	CALL_MARK_ACCESSED = 6,
	CALL_MARK_DIRTY = 7,
};

enum record_op {
	OP_NONE = 0,
	OP_START = 1, /* INVALIDATE */
	OP_END = 2,
	OP_CREATE = 3, /* SLOT, VM */
	OP_DELETE = 4,
	OP_MOVE = 5,
	OP_FLAGS = 6,
	OP_SEEN = 7, /* existed before the recording */
	OP_MAP = 8,  /* PIN */
	OP_UNMAP = 9,
	OP_REFRESH = 10,
	OP_INSTALL = 11, /* SPTE */
	OP_CHANGE = 12,
	OP_ZAP = 13,
};

/* page_state.bits */
enum page_bits {
	PAGE_HAS_STRUCT = 1 << 0, /* there is a struct page behind the pfn */
	PAGE_TAIL = 1 << 1,	  /* tail of a compound page */
	PAGE_HEAD = 1 << 2,	  /* head of a compound page */
	PAGE_RESERVED = 1 << 3,
	PAGE_ZERO = 1 << 4, /* the shared zero page, small or huge */
	PAGE_ZONE_DEVICE = 1 << 5,
};

/* State of the page behind a pfn; the counts and flags are those of the compound head. */
struct page_state {
	unsigned long long flags;
	int refcount;
	int mapcount; /* own raw _mapcount: -1 is "not mapped by user space" */
	unsigned int bits;
	unsigned char order; /* of the compound page, else 0 */
	unsigned char pad[3];
};

struct record_header {
	unsigned long long ts;	     /* CLOCK_MONOTONIC, ns: when the record was written */
	unsigned long long fault_ts; /* entry of the guest fault this happened in, or 0 */
	unsigned int seq;	     /* counts this cpu's records, lost ones included */
	unsigned short cpu;
	unsigned char kind;
	unsigned char op;
	unsigned int tid;
	unsigned int tgid;
	unsigned int vm; /* number of the VM in this recording, 0 unknown */
	int vcpu;	 /* -1: not a vCPU in a fault */
	int stack;	 /* stack id, -1 none */
	unsigned int pad;
};

struct fault_record {
	struct record_header h;
	unsigned long long addr; /* fault->addr: gpa with TDP, guest virtual with shadow paging */
	unsigned long long error_code;
	unsigned long long gfn;
	unsigned long long hva;
	unsigned long long pfn;	     /* as the fault-in function returned it */
	unsigned long long walk_pfn; /* found by the PFNMAP walk, ~0 if there was none */
	unsigned long long vm_flags; /* of the PFNMAP VMA, 0 if there was none */
	unsigned long long mmu_seq;
	unsigned long long invalidate_seq;
	unsigned int in_progress;
	/* stages, ns after fault_ts; ~0: not reached */
	unsigned int t_faultin;
	unsigned int t_gup;
	unsigned int t_gup_end;
	unsigned int t_faultin_end;
	unsigned int t_map;
	int ret; /* RET_PF_* or -errno */
	int faultin_ret;
	int slot; /* memslot id, -1 none */
	unsigned char as_id;
	unsigned char level;	  /* fault->goal_level at the end */
	unsigned char refcounted; /* as the kernel said it: 0, 1, 2 = it does not say */
	unsigned char writable;	  /* fault->map_writable */
	unsigned char prefetch;
	unsigned char mmu;   /* enum mmu_flavour of the handler */
	unsigned char sptes; /* leaf SPTEs this fault installed, saturating */
	unsigned char pad[5];
	struct page_state page;	    /* when the fault-in function returned */
	struct page_state page_end; /* when the fault ended: after the release */
};

/* All other kinds: one body, the fields that a kind has not are zero. */
struct event_record {
	struct record_header h;
	unsigned long long gfn;
	unsigned long long pfn;
	unsigned long long
		a; /* SPTE old; INVALIDATE hva start; SLOT npages; VM struct kvm; VMA hva start */
	unsigned long long b; /* SPTE new; INVALIDATE, VMA hva end; SLOT, PIN hva */
	unsigned long long c; /* SPTE sptep; INVALIDATE seq; SLOT flags; VMA vm_flags */
	unsigned int
		d; /* INVALIDATE in_progress; SLOT id; PIN ret; PAGE order; VM tgid; VMA device number */
	unsigned char level;
	unsigned char as_id;
	unsigned char cause; /* SPTE enum spte_cause; RELEASE enum release_call; INVALIDATE event */
	unsigned char mmu;
	struct page_state page;
};

#define FAULT_RECORD_SIZE 216
#define EVENT_RECORD_SIZE 120

_Static_assert(sizeof(struct page_state) == 24, "page_state");
_Static_assert(sizeof(struct record_header) == 48, "record_header");
_Static_assert(sizeof(struct fault_record) == FAULT_RECORD_SIZE, "fault_record");
_Static_assert(sizeof(struct event_record) == EVENT_RECORD_SIZE, "event_record");

#endif
