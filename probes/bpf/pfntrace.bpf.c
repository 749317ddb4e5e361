// SPDX-License-Identifier: GPL-2.0
/*
 * pfntrace's programs.  Each hook is one on_x() function; below it stand the
 * entry points that attach it, as kprobe or as fentry/fexit.  Which of them is
 * attached to which symbol is decided by probes/profile.py.
 *
 * How a fault is followed: the page fault handler opens it, kvm_faultin_pfn()
 * and its kin fill in the stages, SPTE and RELEASE events inside carry its
 * entry time, and the handler's return writes one FAULT record.
 */
#include "pfntrace.h"
#include "state.h"
#include "page.h"

#define PRESENT (1ULL << 11) /* SPTE_MMU_PRESENT_MASK, arch/x86/kvm/mmu/spte.h */
#define LARGE (1ULL << 7)    /* PT_PAGE_SIZE_MASK */
#define ENTRIES 512

/* ------------------------------------------------------------------ */
/*
 * Maps and what works on them.  All of it stands in this file because bcc
 * rewrites map accesses in the main file only: in an included one they would
 * stay calls through a pointer, which the verifier refuses.
 */

BPF_ARRAY(config, struct config, 1);
BPF_HASH(pids, u32, u8, 1024);
BPF_HASH(vms, u64, struct vm_entry, 4096);
BPF_HASH(vm_ids, u32, u64, 65536);
BPF_TABLE("lru_hash", u32, struct thread_state, threads, 16384);
BPF_PERCPU_ARRAY(blank, struct thread_state, 1);
BPF_TABLE("lru_hash", u64, u32, slots, 16384);
BPF_TABLE("lru_hash", u64, u64, table_kvm, 65536); /* shadow page table -> struct kvm */
BPF_PERCPU_ARRAY(counts, struct kind_counts, KIND_MAX);
BPF_PERCPU_ARRAY(seqs, u32, 1);
BPF_ARRAY(pages, struct page_chunk, V_PAGE_CHUNKS);
BPF_PERCPU_ARRAY(pendings, struct pending, 1);
BPF_PERCPU_ARRAY(page_calls, struct page_call, 2);
BPF_PROG_ARRAY(tails, 1);
BPF_PROG_ARRAY(raw_tails, RAW_TAILS);
#if WANT_STACKS
BPF_STACK_TRACE(stacks, 16384);
#endif

BPF_RINGBUF_OUTPUT(faults0, V_FAULT_RING_PAGES);
BPF_RINGBUF_OUTPUT(events0, V_EVENT_RING_PAGES);
#if V_RINGS > 1
BPF_RINGBUF_OUTPUT(faults1, V_FAULT_RING_PAGES);
BPF_RINGBUF_OUTPUT(events1, V_EVENT_RING_PAGES);
#endif
#if V_RINGS > 2
BPF_RINGBUF_OUTPUT(faults2, V_FAULT_RING_PAGES);
BPF_RINGBUF_OUTPUT(events2, V_EVENT_RING_PAGES);
BPF_RINGBUF_OUTPUT(faults3, V_FAULT_RING_PAGES);
BPF_RINGBUF_OUTPUT(events3, V_EVENT_RING_PAGES);
#endif

inline_fn struct config *armed_config(void)
{
	int zero = 0;
	struct config *cfg = config.lookup(&zero);

	return cfg && cfg->armed ? cfg : NULL;
}

inline_fn struct thread_state *thread_find(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	return threads.lookup(&tid);
}

inline_fn struct thread_state *thread_get(void)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct thread_state *st = threads.lookup(&tid), *fresh;
	int zero = 0;

	if (st)
		return st;
	fresh = blank.lookup(&zero);
	if (!fresh)
		return NULL;
	threads.update(&tid, fresh);
	return threads.lookup(&tid);
}

/* Numbers VMs from 1; inserting the number is what makes it unique. */
inline_fn u32 new_vm_id(struct config *cfg, u64 kvm)
{
	u32 id = cfg->next_vm + 1;

	if (vm_ids.insert(&id, &kvm)) {
		/* Two VMs were met at the same moment: any free number will do. */
		id = bpf_get_prandom_u32() | 1U << 31;
		vm_ids.insert(&id, &kvm);
		return id;
	}
	cfg->next_vm = id;
	return id;
}

/*
 * The entry of a VM, made at first sight.  The process is the owner of
 * kvm->mm, right in any task: notifiers and workers run elsewhere.
 */
inline_fn struct vm_entry *vm_of(struct config *cfg, u64 kvm)
{
	struct vm_entry *vm = vms.lookup(&kvm);
	struct vm_entry fresh = {};
	u64 mm, owner;

	if (vm)
		return vm;
	mm = PEEK(u64, kvm + O_kvm_mm);
	owner = O_mm_owner ? PEEK(u64, mm + O_mm_owner) : 0;
	fresh.tgid = owner ? PEEK(u32, owner + O_task_tgid) : bpf_get_current_pid_tgid() >> 32;
	fresh.traced = 1;
	if (cfg->n_pids)
		fresh.traced = pids.lookup(&fresh.tgid) ? 1 : 0;
	fresh.id = new_vm_id(cfg, kvm);
	/* Another cpu may have met it at the same moment: the first number stays. */
	vms.insert(&kvm, &fresh);
	return vms.lookup(&kvm);
}

inline_fn struct kind_counts *count_of(u32 kind)
{
	struct kind_counts *c = counts.lookup(&kind);

	if (c)
		__sync_fetch_and_add(&c->produced, 1);
	return c;
}

inline_fn void count_filtered(u32 kind)
{
	struct kind_counts *c = count_of(kind);

	if (c)
		__sync_fetch_and_add(&c->filtered, 1);
}

/* A record that was begun and whose end was missed. */
inline_fn void count_torn(u32 kind)
{
	struct kind_counts *c = count_of(kind);

	if (!c)
		return;
	__sync_fetch_and_add(&c->lost, 1);
	__sync_fetch_and_add(&c->torn, 1);
}

inline_fn u32 next_seq(void)
{
	int zero = 0;
	u32 *seq = seqs.lookup(&zero);

	/*
	 * bcc's code generator has no atomic add that returns the value.  An
	 * interrupt between load and store may repeat a number; ts tells the
	 * two records apart, and losses are counted elsewhere.
	 */
	return seq ? (*seq)++ : 0;
}

inline_fn void stamp(struct record_header *h, u32 kind, u32 op)
{
	u64 id = bpf_get_current_pid_tgid();

	h->ts = bpf_ktime_get_ns();
	h->seq = next_seq();
	h->cpu = bpf_get_smp_processor_id();
	h->kind = kind;
	h->op = op;
	h->tid = id;
	h->tgid = id >> 32;
}

inline_fn int put_fault(u32 cpu, struct fault_record *r)
{
#if V_RINGS > 2
	if (cpu % 4 == 3)
		return faults3.ringbuf_output(r, sizeof(*r), RB_NO_WAKEUP);
	if (cpu % 4 == 2)
		return faults2.ringbuf_output(r, sizeof(*r), RB_NO_WAKEUP);
#endif
#if V_RINGS > 1
	if (cpu & 1)
		return faults1.ringbuf_output(r, sizeof(*r), RB_NO_WAKEUP);
#endif
	return faults0.ringbuf_output(r, sizeof(*r), RB_NO_WAKEUP);
}

inline_fn int put_event(u32 cpu, struct event_record *r, u64 wakeup)
{
#if V_RINGS > 2
	if (cpu % 4 == 3)
		return events3.ringbuf_output(r, sizeof(*r), wakeup);
	if (cpu % 4 == 2)
		return events2.ringbuf_output(r, sizeof(*r), wakeup);
#endif
#if V_RINGS > 1
	if (cpu & 1)
		return events1.ringbuf_output(r, sizeof(*r), wakeup);
#endif
	return events0.ringbuf_output(r, sizeof(*r), wakeup);
}

/* Counts and writes one event whose header names its VM already. */
inline_fn void emit_event(void *ctx, struct event_record *e, u32 kind, u32 op, u64 wakeup)
{
	struct kind_counts *c = count_of(kind);

	stamp(&e->h, kind, op);
	e->h.stack = -1;
#if WANT_STACKS
	if (kind != KIND_RELEASE)
		e->h.stack = stacks.get_stackid(ctx, 0);
#endif
	if (put_event(e->h.cpu, e, wakeup) && c)
		__sync_fetch_and_add(&c->lost, 1);
}

/* --gfn: does [gfn, gfn + pages of the level) meet the wanted range? */
inline_fn int gfn_wanted(struct config *cfg, u64 gfn, u32 level)
{
	u64 inside = level == 3 ? 262143 : level == 2 ? 511 : 0;

	return (gfn & ~inside) <= cfg->gfn_hi && (gfn | inside) >= cfg->gfn_lo;
}

inline_fn void cause_push(struct thread_state *st, u64 cause)
{
	st->causes = st->causes << 4 | cause;
}

inline_fn u32 cause_pop(struct thread_state *st)
{
	u32 cause = st->causes & 15;

	st->causes >>= 4;
	return cause;
}

/* ------------------------------------------------------------------ */
/* Pages that guests map                                               */

/* A leaf SPTE of this level maps pfn now: its pages are of interest until freed. */
inline_fn void mark_mapped(u64 pfn, u32 level, u32 vm)
{
	u32 chunk = pfn / PAGE_CHUNK;
	struct page_chunk *c = pages.lookup(&chunk);
	u16 mark = PAGE_MAPPED | (vm <= PAGE_VM_MAX ? vm << PAGE_VM_SHIFT : 0);
	u64 *w;
	int i;

	if (!c)
		return;
	if (level == 1) {
		c->w[pfn % PAGE_CHUNK] = mark;
		return;
	}
	/* 2M leaves fill an eighth of a chunk; of a 1G leaf only its first 2M are marked. */
	w = (u64 *)&c->w[pfn % PAGE_CHUNK & ~511ULL];
#pragma clang loop unroll(disable)
	for (i = 0; i < 128; i++)
		w[i] = mark * PAGE_LANES;
}

/* Moves one page from one state to another; its old word if it was in the first, else 0. */
inline_fn u32 move_page(struct page_chunk *c, u32 at, u32 from, u32 to)
{
	u32 word;

	at &= PAGE_CHUNK - 1;
	word = c->w[at];
	if ((word & PAGE_STATE) != from)
		return 0;
	c->w[at] = to ? (word & ~PAGE_STATE) | to : 0;
	return word;
}

/* The first lane of a word of four pages that has a bit of `hits`. */
inline_fn u32 lane_of(u64 word, u64 hits)
{
	if (hits & 0xffff)
		return word & 0xffff;
	if (hits & 0xffff0000)
		return word >> 16 & 0xffff;
	if (hits & 0xffff00000000)
		return word >> 32 & 0xffff;
	return word >> 48;
}

/*
 * The same for a block of 2^order pages: false if none of them moved.  `vm` is
 * that of one of those that did.  A buddy block is aligned to its size, so it
 * lies within one chunk.  From order 2 on whole words belong to the block: no
 * other cpu writes to them, and the loop selects with masks, since a branch
 * would multiply the verifier's paths.
 */
inline_fn int move_pages(u64 pfn, u32 order, u64 from, u64 to, u32 *vm)
{
	u32 chunk = pfn / PAGE_CHUNK, at = pfn % PAGE_CHUNK, i, lane;
	struct page_chunk *c = pages.lookup(&chunk);
	u64 hits = 0, word = 0, hit, any, *w;

	if (!c)
		return 0;
	lane = move_page(c, at, from, to);
	if (order == 1)
		lane |= move_page(c, at + 1, from, to);
	if (order < 2) {
		*vm = lane >> PAGE_VM_SHIFT;
		return lane != 0;
	}
	if (lane) {
		hits = from;
		word = lane;
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < 256; i++) { /* MAX_PAGE_ORDER 10 */
		if (i >= 1U << (order - 2))
			break;
		w = (u64 *)&c->w[(at + i * 4) & (PAGE_CHUNK - 4)];
		hit = *w & from * PAGE_LANES;
		any = 0 - ((hit | (0 - hit)) >> 63); /* all ones if there was a hit */
		hits = (hit & any) | (hits & ~any);
		word = (*w & any) | (word & ~any);
		*w = (*w & ~hit) | (to ? hit << 1 : 0);
	}
	*vm = lane_of(word, hits) >> PAGE_VM_SHIFT;
	return hits != 0;
}

/* ------------------------------------------------------------------ */
/* Events on their way out                                             */

/* The reason to write down; a zap in a VM without users is its teardown. */
inline_fn u32 cause_now(struct thread_state *st, u64 kvm)
{
	u32 cause = st ? st->causes & 15 : CAUSE_OTHER;

	if (cause == CAUSE_OTHER || cause == CAUSE_ROOT || cause == CAUSE_SLOT)
		if (!PEEK(u32, kvm + O_kvm_users_count))
			return CAUSE_TEARDOWN;
	return cause;
}

/* Where programs of kprobes build an event: they never run inside one another on one cpu. */
inline_fn struct pending *scratch(void)
{
	int zero = 0;

	return pendings.lookup(&zero);
}

/* Starts an event in scratch space; `kvm` may be 0. */
inline_fn struct pending *pending_event(struct pending *p, u32 kind, u32 op, u64 kvm)
{
	if (!p)
		return NULL;
	__builtin_memset(p, 0, sizeof(*p));
	p->kind = kind;
	p->op = op;
	p->kvm = kvm;
	p->e.h.vcpu = -1;
	return p;
}

/* Names the VM, filters, looks at the page, writes. */
inline_fn void finish_event(void *ctx, struct pending *p)
{
	struct thread_state *st = thread_find();
	struct config *cfg = armed_config();
	struct event_record *e = &p->e;
	struct vm_entry *vm;

	if (!cfg)
		return;
	if (st && st->fault && st->kvm == p->kvm) {
		e->h.vm = st->vm;
		e->h.vcpu = st->rec.h.vcpu;
		e->h.fault_ts = st->rec.h.fault_ts;
		if (p->flags & PENDING_MARK && st->rec.sptes < 255)
			st->rec.sptes++;
	} else if (p->kvm) {
		vm = vm_of(cfg, p->kvm);
		if (vm && !vm->traced) {
			count_filtered(p->kind);
			return;
		}
		e->h.vm = vm ? vm->id : 0;
	}
	if (p->flags & PENDING_GFN && !gfn_wanted(cfg, e->gfn, e->level)) {
		count_filtered(p->kind);
		return;
	}
	if (p->flags & PENDING_CAUSE && !e->cause)
		e->cause = cause_now(st, p->kvm);
	if (p->flags & PENDING_PAGE)
		read_page(e->pfn, &e->page);
	if (p->flags & PENDING_MARK)
		mark_mapped(e->pfn, e->level, e->h.vm);
	emit_event(ctx, e, p->kind, p->op,
		   p->flags & PENDING_WAKE ? RB_FORCE_WAKEUP : RB_NO_WAKEUP);
}

/*
 * kprobes and kretprobes end in a tail call to this one program, so that its
 * code is compiled and verified once and not in every hook.
 */
int tail_event(struct pt_regs *ctx)
{
	struct pending *p = scratch();

	if (p)
		finish_event(ctx, p);
	return 0;
}

/*
 * The same for tracepoints.  Their programs may be preempted since 7.0, so the
 * event is built in the thread's own entry.
 */
int raw_tail_event(struct bpf_raw_tracepoint_args *ctx)
{
	struct thread_state *st = thread_find();

	if (st)
		finish_event(ctx, &st->pending);
	return 0;
}

inline_fn void send_event(struct pt_regs *ctx)
{
	tails.call(ctx, 0);
}

/* ------------------------------------------------------------------ */
/* One guest page fault                                                */

inline_fn u32 since(u64 ts)
{
	u64 delta = bpf_ktime_get_ns() - ts;

	return delta < 0xfffffffe ? delta : 0xfffffffe;
}

inline_fn void on_fault_enter(u64 vcpu, u64 fault, u32 mmu)
{
	struct config *cfg = armed_config();
	struct thread_state *st;
	struct vm_entry *vm;
	u64 kvm;

	if (!cfg)
		return;
	kvm = PEEK(u64, vcpu + O_vcpu_kvm);
	vm = vm_of(cfg, kvm);
	if (!vm)
		return;
	if (!vm->traced) {
		count_filtered(KIND_FAULT);
		return;
	}
	st = thread_get();
	if (!st)
		return;
	/*
	 * No handler calls another that is hooked, so a fault that is still open
	 * is one whose return was missed: kretprobe instances run out when more
	 * than max(10, 2 * cpus) vCPUs sleep in it.
	 */
	if (st->fault)
		count_torn(KIND_FAULT);
	st->fault = fault;
	st->kvm = kvm;
	st->vm = vm->id;
	st->causes = CAUSE_FAULT;
	st->rec.h.vm = vm->id;
	st->rec.h.vcpu = PEEK(u32, vcpu + O_vcpu_id);
	st->rec.mmu = mmu;
	st->rec.slot = -1;
	st->rec.as_id = 0;
	st->released_pfn = 0;
	st->rec.t_faultin = st->rec.t_gup = st->rec.t_gup_end = ~0;
	st->rec.t_faultin_end = st->rec.t_map = ~0;
	st->rec.faultin_ret = -1;
	st->rec.walk_pfn = ~0ULL;
	st->rec.vm_flags = 0;
	st->rec.hva = 0;
	st->rec.pfn = ~0ULL;
	st->rec.mmu_seq = 0;
	st->rec.sptes = 0;
	st->rec.refcounted = 2;
	st->rec.page.bits = 0;
	st->rec.page_end.bits = 0;
	st->rec.h.fault_ts = bpf_ktime_get_ns();
}

inline_fn struct thread_state *open_fault(void)
{
	struct thread_state *st = thread_find();

	return st && st->fault ? st : NULL;
}

/* A slot that the recording has not seen created gets a SLOT record at its first fault. */
inline_fn void see_slot(void *ctx, struct thread_state *st, u64 slot, u64 *words)
{
	struct event_record e = {};
	u32 one = 1;

	st->last_slot = slot;
	if (slots.lookup(&slot))
		return;
	slots.update(&slot, &one);
	e.h.vm = st->vm;
	e.h.vcpu = st->rec.h.vcpu;
	e.h.fault_ts = st->rec.h.fault_ts;
	e.gfn = words[0];
	e.a = words[(O_slot_npages - O_slot_base_gfn) / 8];
	e.b = words[(O_slot_hva - O_slot_base_gfn) / 8];
	e.c = PEEK(u32, slot + O_slot_flags);
	e.d = PEEK(u16, slot + O_slot_id);
	e.as_id = PEEK(u16, slot + O_slot_as_id);
	emit_event(ctx, &e, KIND_SLOT, OP_SEEN, RB_FORCE_WAKEUP);
}

#define SLOT_WORDS ((O_slot_hva - O_slot_base_gfn) / 8 + 1)
#define FAULT_WORDS ((V_fault_sizeof + 7) / 8)
#define FAULT_FIELD(T, words, off) (*(T *)((char *)(words) + (off)))

/* What struct kvm_page_fault says; the pfn only when the fault-in function has just returned. */
inline_fn void read_fault(void *ctx, struct thread_state *st, int with_pfn)
{
	u64 words[FAULT_WORDS] = {}, slot;
	struct fault_record *r = &st->rec;

	if (bpf_probe_read_kernel(words, V_fault_sizeof, (void *)st->fault))
		return;
	r->addr = FAULT_FIELD(u64, words, O_fault_addr);
	r->error_code = V_fault_error_code_size == 4 ? FAULT_FIELD(u32, words, O_fault_error_code) :
						       FAULT_FIELD(u64, words, O_fault_error_code);
	r->prefetch = FAULT_FIELD(u8, words, O_fault_prefetch);
	r->gfn = FAULT_FIELD(u64, words, O_fault_gfn);
	r->level = FAULT_FIELD(u8, words, O_fault_goal_level);
#if HAVE_fault_mmu_seq
	r->mmu_seq = FAULT_FIELD(u64, words, O_fault_mmu_seq);
#endif
	r->writable = 0;
	if (!with_pfn)
		return;
	r->pfn = FAULT_FIELD(u64, words, O_fault_pfn);
	r->writable = FAULT_FIELD(u8, words, O_fault_map_writable);
#if HAVE_fault_refcounted_page
	r->refcounted = FAULT_FIELD(u64, words, O_fault_refcounted_page) ? 1 : 0;
#elif HAVE_fault_is_refcounted_page
	r->refcounted = FAULT_FIELD(u8, words, O_fault_is_refcounted_page) ? 1 : 0;
#endif
	slot = FAULT_FIELD(u64, words, O_fault_slot);
	if (slot) {
		u64 s[SLOT_WORDS] = {};

		if (bpf_probe_read_kernel(s, sizeof(s), (void *)(slot + O_slot_base_gfn)))
			return;
		r->hva = s[SLOT_WORDS - 1] + (r->gfn - s[0]) * 4096;
		r->slot = (s32)PEEK(u16, slot + O_slot_id);
		r->as_id = PEEK(u16, slot + O_slot_as_id);
		if (slot != st->last_slot)
			see_slot(ctx, st, slot, s);
	}
}

inline_fn void on_fault_exit(void *ctx, int ret)
{
	struct thread_state *st = open_fault();
	struct fault_record *r;
	struct kind_counts *c;
	struct config *cfg;
	u64 seq[2] = {};

	if (!st)
		return;
	r = &st->rec;
	cfg = armed_config();
	if (!cfg) {
		st->fault = 0;
		st->causes = 0;
		return;
	}
	if (r->t_faultin_end == ~0U)
		read_fault(ctx, st, 0);
	else
		r->level = PEEK(u8, st->fault + O_fault_goal_level);
	if (!gfn_wanted(cfg, r->gfn, r->level)) {
		count_filtered(KIND_FAULT);
		st->fault = 0;
		st->causes = 0;
		return;
	}
	bpf_probe_read_kernel(seq, sizeof(seq), (void *)(st->kvm + O_kvm_invalidate_seq));
	r->invalidate_seq = seq[0];
	r->in_progress = seq[(O_kvm_in_progress - O_kvm_invalidate_seq) / 8];
	r->ret = ret;
	if (r->page.bits)
		read_page(r->pfn >> 40 ? r->walk_pfn : r->pfn, &r->page_end);
	c = count_of(KIND_FAULT);
	stamp(&r->h, KIND_FAULT, OP_NONE);
	r->h.stack = -1;
#if WANT_STACKS
	r->h.stack = stacks.get_stackid(ctx, 0);
#endif
	if (put_fault(r->h.cpu, r) && c)
		__sync_fetch_and_add(&c->lost, 1);
	st->fault = 0;
	st->causes = 0;
}

inline_fn void on_faultin_enter(void)
{
	struct thread_state *st = open_fault();

	if (!st)
		return;
	st->rec.t_faultin = since(st->rec.h.fault_ts);
#if !HAVE_fault_mmu_seq
	/* 6.1 keeps its snapshot in a local variable, taken right before this call. */
	st->rec.mmu_seq = PEEK(u64, st->kvm + O_kvm_invalidate_seq);
#endif
}

inline_fn void on_faultin_exit(void *ctx, int ret)
{
	struct thread_state *st = open_fault();
	struct fault_record *r;

	if (!st)
		return;
	r = &st->rec;
	r->t_faultin_end = since(r->h.fault_ts);
	r->faultin_ret = ret;
	read_fault(ctx, st, 1);
	if (ret && !r->pfn) /* given up before there was one */
		r->pfn = ~0ULL;
	read_page(r->pfn >> 40 ? r->walk_pfn : r->pfn, &r->page);
}

inline_fn void on_gup_enter(void)
{
	struct thread_state *st = open_fault();

	if (st && st->rec.t_gup == ~0U)
		st->rec.t_gup = since(st->rec.h.fault_ts);
}

inline_fn void on_gup_exit(void)
{
	struct thread_state *st = open_fault();

	if (st)
		st->rec.t_gup_end = since(st->rec.h.fault_ts);
}

inline_fn void on_map_enter(void)
{
	struct thread_state *st = open_fault();

	if (st && st->rec.t_map == ~0U)
		st->rec.t_map = since(st->rec.h.fault_ts);
}

int kp_fault_tdp(struct pt_regs *ctx)
{
	on_fault_enter(ctx->di, ctx->si, MMU_TDP);
	return 0;
}

/* kvm_tdp_mmu_page_fault(): what kvm_tdp_page_fault() calls, if it was not inlined there. */
int kp_fault_tdp_mmu(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();

	if (!st || st->fault != ctx->si)
		on_fault_enter(ctx->di, ctx->si, MMU_TDP);
	return 0;
}

int kp_fault_shadow(struct pt_regs *ctx)
{
	on_fault_enter(ctx->di, ctx->si, MMU_SHADOW);
	return 0;
}

int kr_fault(struct pt_regs *ctx)
{
	on_fault_exit(ctx, ctx->ax);
	return 0;
}

#if FENTRY_faultin
int FENTRY_KVM(SYM_faultin)(u64 *ctx)
{
	on_faultin_enter();
	return 0;
}

int FEXIT_KVM(SYM_faultin)(u64 *ctx)
{
	on_faultin_exit(ctx, ctx[V_faultin_args]);
	return 0;
}
#else
int kp_faultin(struct pt_regs *ctx)
{
	on_faultin_enter();
	return 0;
}

int kr_faultin(struct pt_regs *ctx)
{
	on_faultin_exit(ctx, ctx->ax);
	return 0;
}
#endif

#if FENTRY_gup
int FENTRY_KVM(SYM_gup)(u64 *ctx)
{
	on_gup_enter();
	return 0;
}

int FEXIT_KVM(SYM_gup)(u64 *ctx)
{
	on_gup_exit();
	return 0;
}
#elif HAVE_gup
int kp_gup(struct pt_regs *ctx)
{
	on_gup_enter();
	return 0;
}

int kr_gup(struct pt_regs *ctx)
{
	on_gup_exit();
	return 0;
}
#endif

#if FENTRY_map
int FENTRY_KVM(SYM_map)(u64 *ctx)
{
	on_map_enter();
	return 0;
}
#elif HAVE_map
int kp_map(struct pt_regs *ctx)
{
	on_map_enter();
	return 0;
}
#endif

/* ------------------------------------------------------------------ */
/* The walk of a PFNMAP mapping: which page KVM looked at, and its VMA  */

#if HAVE_pfnmap_args
/* follow_pfnmap_start(struct follow_pfnmap_args *), mm/memory.c, since 6.12 */
int kp_walk(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();

	if (st)
		st->walk = ctx->di;
	return 0;
}

int kr_walk(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();
	struct pending *p;
	u64 vma, file, walk, start, end;

	if (!st || !st->walk)
		return 0;
	walk = st->walk;
	st->walk = 0;
	if ((int)ctx->ax)
		return 0;
	st->rec.walk_pfn = PEEK(u64, walk + O_pfnmap_pfn);
	vma = PEEK(u64, walk + O_pfnmap_vma);
	st->rec.vm_flags = PEEK(u64, vma + O_vma_flags);
	start = PEEK(u64, vma + O_vma_start);
	end = PEEK(u64, vma + O_vma_end);
	if ((vma ^ start ^ end << 1) == st->last_vma) /* addresses alone are reused */
		return 0;
	st->last_vma = vma ^ start ^ end << 1;
	p = pending_event(scratch(), KIND_VMA, OP_SEEN, st->kvm);
	if (!p)
		return 0;
	p->flags = PENDING_WAKE;
	p->e.a = start;
	p->e.b = end;
	p->e.c = st->rec.vm_flags;
	file = PEEK(u64, vma + O_vma_file);
	if (file)
		p->e.d = PEEK(u32, PEEK(u64, file + O_file_inode) + O_inode_rdev);
	send_event(ctx);
	return 0;
}
#elif HAVE_follow_pte
/* follow_pte(mm, address, pte_t **ptepp, spinlock_t **ptlp), mm/memory.c, up to 6.11 */
int kp_walk(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();

	if (st)
		st->walk = ctx->dx;
	return 0;
}

int kr_walk(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();
	u64 pte;

	if (!st || !st->walk)
		return 0;
	if ((int)ctx->ax == 0) {
		pte = PEEK(u64, PEEK(u64, st->walk));
		st->rec.walk_pfn = (pte & V_SPTE_ADDR_MASK) >> 12;
	}
	st->walk = 0;
	return 0;
}
#endif

/* ------------------------------------------------------------------ */
/* Leaf SPTEs                                                          */

inline_fn int is_leaf(u64 spte, u32 level)
{
	return (spte & PRESENT) && (level == 1 || (spte & LARGE));
}

inline_fn u64 spte_pfn(u64 spte)
{
	return (spte & V_SPTE_ADDR_MASK) >> 12;
}

/* Describes one leaf change; false if neither side is a leaf. */
inline_fn struct pending *leaf_event(struct pending *p, u64 kvm, u64 gfn, u64 old, u64 new,
				     u32 level, u32 as_id, u64 sptep, u32 mmu, u32 cause)
{
	int was = is_leaf(old, level), is = is_leaf(new, level);

	if (!was && !is)
		return NULL;
	p = pending_event(p, KIND_SPTE, was && is ? OP_CHANGE : is ? OP_INSTALL : OP_ZAP, kvm);
	if (!p)
		return NULL;
	p->flags = PENDING_GFN | PENDING_CAUSE | PENDING_PAGE | (is ? PENDING_MARK : 0);
	p->e.gfn = gfn;
	p->e.pfn = spte_pfn(is ? new : old);
	p->e.a = old;
	p->e.b = new;
	p->e.c = sptep;
	p->e.level = level;
	p->e.as_id = as_id;
	p->e.mmu = mmu;
	p->e.cause = cause;
	return p;
}

/*
 * Aging and dirty logging clear single bits without handle_changed_spte()
 * since 6.2 (tdp_mmu_clear_spte_bits()); the tracepoint sees those, so inside
 * them this hook keeps still and on_bits_changed() writes.
 */
inline_fn int bits_by_tracepoint(struct thread_state *st)
{
	u32 cause = st ? st->causes & 15 : 0;

	return HAVE_tdp_spte_changed && (cause == CAUSE_AGING || cause == CAUSE_DIRTY_LOG);
}

#if HAVE_spte
/* __handle_changed_spte(kvm, as_id or sp, gfn, old_spte, new_spte, level, shared) */
int kp_spte(struct pt_regs *ctx)
{
	u64 old = ctx->cx, new = ctx->r8;
	u32 as_id = ctx->si;

	if (old == new || !armed_config() || bits_by_tracepoint(thread_find()))
		return 0;
#if HAVE_changed_sp /* the second argument is struct kvm_mmu_page since 7.x */
	as_id = PEEK(u32, ctx->si + O_sp_role) >> V_role_smm_shift & 1;
#endif
	if (leaf_event(scratch(), ctx->di, ctx->dx, old, new, ctx->r9, as_id, 0, MMU_TDP, 0))
		send_event(ctx);
	return 0;
}
#endif

#if HAVE_tdp_spte_changed
/* kvmmmu:kvm_tdp_mmu_spte_changed(as_id, gfn, level, old_spte, new_spte) */
int raw_tracepoint__kvm_tdp_mmu_spte_changed(struct bpf_raw_tracepoint_args *ctx)
{
	struct config *cfg = armed_config();
	struct thread_state *st;
	struct pending *p;

	if (!cfg || !cfg->bit_clearers)
		return 0;
	st = thread_find();
	if (!st || !bits_by_tracepoint(st))
		return 0;
	p = leaf_event(&st->pending, st->kvm, ctx->args[1], ctx->args[3], ctx->args[4],
		       ctx->args[2], ctx->args[0], 0, MMU_TDP, 0);
	if (p)
		raw_tails.call(ctx, RAW_TAIL_CHANGED);
	return 0;
}
#endif

/* The shadow page that holds an entry: sptep_to_sp(), arch/x86/kvm/mmu/spte.h */
inline_fn u64 sp_of(u64 sptep)
{
	return PEEK(u64, page_addr((sptep - V_PAGE_OFFSET) >> 12) + O_page_private);
}

/* kvm_mmu_page_get_gfn(), arch/x86/kvm/mmu/mmu.c */
inline_fn u64 sp_gfn(u64 sp, u64 sptep, u32 role)
{
	u64 gfn = PEEK(u64, sp + O_sp_gfn), index = (sptep & 4095) / 8, table;
	u32 level = role & 15;

#if HAVE_sp_translation
	table = PEEK(u64, sp + O_sp_translation);
	if (table)
		return PEEK(u64, table + index * 8) >> V_sp_translation_shift;
#endif
	return gfn + (index << (level - 1) * 9);
}

inline_fn struct pending *shadow_leaf(struct pending *p, u64 kvm, u64 sptep, u64 old, u64 new,
				      u32 mmu, u32 cause)
{
	u64 sp = sp_of(sptep);
	u32 role = PEEK(u32, sp + O_sp_role);

	return leaf_event(p, kvm, sp_gfn(sp, sptep, role), old, new, role & 15,
			  role >> V_role_smm_shift & 1, sptep, mmu, cause);
}

/* mmu_set_spte(vcpu, slot, sptep, pte_access, gfn, pfn, fault): fault NULL is a prefetch */
int kp_set_spte(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();
	u64 table;

	if (!st)
		return 0;
	if (st->rec.t_map == ~0U)
		st->rec.t_map = since(st->rec.h.fault_ts);
	if (st->set_sptep)
		count_torn(KIND_SPTE);
	st->set_sptep = ctx->dx;
	st->set_gfn = ctx->r8;
	st->set_old = PEEK(u64, ctx->dx);
	st->set_prefetch = STACK_ARG(ctx, 0) ? 0 : 1;
	table = ctx->dx >> 12;
	table_kvm.update(&table, &st->kvm);
	return 0;
}

int kr_set_spte(struct pt_regs *ctx)
{
	struct thread_state *st = open_fault();
	u64 sptep, new;

	if (!st || !st->set_sptep)
		return 0;
	sptep = st->set_sptep;
	st->set_sptep = 0;
	new = PEEK(u64, sptep);
	if (new != st->set_old &&shadow_leaf(scratch(), st->kvm, sptep, st->set_old, new,
					     MMU_SHADOW, st->set_prefetch ? CAUSE_PREFETCH : 0))
		send_event(ctx);
	return 0;
}

/* mmu_spte_clear_track_bits(kvm, sptep): every way a shadow leaf goes */
int kp_clear_spte(struct pt_regs *ctx)
{
	struct thread_state *st;
	u64 old;

	if (!armed_config())
		return 0;
	old = PEEK(u64, ctx->si);
	if (!(old & PRESENT))
		return 0;
	st = thread_find();
	if (st && st->set_sptep == ctx->si)
		st->set_old = 0;
	if (shadow_leaf(scratch(), ctx->di, ctx->si, old, 0, MMU_SHADOW, 0))
		send_event(ctx);
	return 0;
}

/* mmu_spte_update(sptep, new_spte): protection, aging, dirty logging; no VM in sight */
int kp_update_spte(struct pt_regs *ctx)
{
	struct thread_state *st;
	u64 old, table, *kvm;

	if (!armed_config())
		return 0;
	st = thread_find();
	if (st && st->set_sptep == ctx->di)
		return 0; /* mmu_set_spte() reports it */
	old = PEEK(u64, ctx->di);
	if (old == ctx->si)
		return 0;
	table = ctx->di >> 12;
	kvm = table_kvm.lookup(&table);
	if (kvm && shadow_leaf(scratch(), *kvm, ctx->di, old, ctx->si, MMU_SHADOW, 0))
		send_event(ctx);
	return 0;
}

#if HAVE_fast_page_fault
/* kvmmmu:fast_page_fault(vcpu, fault, sptep, old_spte, ret) */
int raw_tracepoint__fast_page_fault(struct bpf_raw_tracepoint_args *ctx)
{
	u64 sptep = ctx->args[2], old = ctx->args[3], new;
	struct thread_state *st = open_fault();
	struct pending *p;

	if (!st || !sptep)
		return 0;
	new = PEEK(u64, sptep);
	if (new == old || (int)ctx->args[4] != V_RET_PF_FIXED)
		return 0;
	p = shadow_leaf(&st->pending, st->kvm, sptep, old, new, st->rec.mmu, CAUSE_FAST);
	if (p)
		raw_tails.call(ctx, RAW_TAIL_FAST);
	return 0;
}
#endif

/* ------------------------------------------------------------------ */
/* References given back                                               */

/* Whose reference this thread gives back: it is in a fault, has a reason, or undoes a pin. */
inline_fn u64 release_kvm(struct thread_state *st)
{
	if (!st)
		return 0;
	return st->fault || st->causes ? st->kvm : st->unpin_kvm;
}

/*
 * kvm_release_pfn_clean() calls kvm_release_page_clean() in some builds and
 * has it inlined in others.  A put shows once: the inner call is another
 * function, and finds the count as it was when the outer one began.
 */
inline_fn int on_release(u32 call, u64 pfn)
{
	struct config *cfg = armed_config();
	struct thread_state *st;
	struct pending *p;
	u32 tgid;

	if (!cfg || pfn >> 40)
		return 0;
	st = thread_get();
	p = pending_event(scratch(), KIND_RELEASE, OP_NONE, release_kvm(st));
	if (!st || !p)
		return 0;
	read_page(pfn, &p->e.page);
	if (call < CALL_MARK_ACCESSED) {
		if (st->released_pfn == pfn + 1 && st->released_call != call &&
		    st->released_count == p->e.page.refcount) {
			st->released_pfn = 0;
			return 0;
		}
		st->released_pfn = pfn + 1;
		st->released_call = call;
		st->released_count = p->e.page.refcount;
	}
	if (cfg->n_pids && !p->kvm) {
		tgid = bpf_get_current_pid_tgid() >> 32;
		if (!pids.lookup(&tgid)) {
			count_filtered(KIND_RELEASE);
			return 0;
		}
	}
	p->e.pfn = pfn;
	p->e.cause = call;
	/* Of a prefetched page only KVM knows the guest frame. */
	if (st->fault && (st->rec.t_faultin_end == ~0U || st->rec.pfn == pfn)) {
		p->flags = PENDING_GFN;
		p->e.gfn = PEEK(u64, st->fault + O_fault_gfn);
	}
	return 1;
}

#define RELEASE_PFN(name, call)                \
	int kp_##name(struct pt_regs *ctx)     \
	{                                      \
		if (on_release(call, ctx->di)) \
			send_event(ctx);       \
		return 0;                      \
	}
#define RELEASE_PAGE(name, call)                                                     \
	int kp_##name(struct pt_regs *ctx)                                           \
	{                                                                            \
		if (is_page_pointer(ctx->di) && on_release(call, page_pfn(ctx->di))) \
			send_event(ctx);                                             \
		return 0;                                                            \
	}

#if HAVE_release_pfn
RELEASE_PFN(release_pfn_clean, CALL_PFN_CLEAN)
RELEASE_PFN(release_pfn_dirty, CALL_PFN_DIRTY)
RELEASE_PFN(mark_pfn_accessed, CALL_MARK_ACCESSED)
RELEASE_PFN(mark_pfn_dirty, CALL_MARK_DIRTY)
#endif
RELEASE_PAGE(release_page_clean, CALL_PAGE_CLEAN)
RELEASE_PAGE(release_page_dirty, CALL_PAGE_DIRTY)
#if HAVE_mark_page
RELEASE_PAGE(mark_page_accessed, CALL_MARK_ACCESSED)
RELEASE_PAGE(mark_page_dirty, CALL_MARK_DIRTY)
#endif

#if HAVE_finish_fault
/*
 * kvm_mmu_finish_page_fault(vcpu, fault, r) of 6.13+.  gcc turns it into
 * .isra.0 with (page, writable, r); the two are told apart by the first
 * argument, which is a struct page only in the second form.
 */
int kp_finish_fault(struct pt_regs *ctx)
{
	u64 page = ctx->di;

	if (page && !is_page_pointer(page))
		page = PEEK(u64, ctx->si + O_fault_refcounted_page);
	if (is_page_pointer(page) && on_release(CALL_FINISH_FAULT, page_pfn(page)))
		send_event(ctx);
	return 0;
}
#endif

/* ------------------------------------------------------------------ */
/* Reasons: who is at work in this thread                              */

inline_fn struct thread_state *reason_enter(struct config *cfg, u64 kvm, u32 cause)
{
	struct thread_state *st = thread_get();
	struct vm_entry *vm;

	if (!st)
		return NULL;
	if (!st->fault) {
		vm = kvm ? vm_of(cfg, kvm) : NULL;
		st->kvm = kvm;
		st->vm = vm ? vm->id : 0;
		st->released_pfn = 0;
	}
	/* Emptying a root is how others work: the reason that called for it stays. */
	cause_push(st, cause == CAUSE_ROOT && st->causes ? st->causes & 15 : cause);
	return st;
}

#define REASON(name, cause, vm)                       \
	int kp_reason_##name(struct pt_regs *ctx)     \
	{                                             \
		struct config *cfg = armed_config();  \
		if (cfg)                              \
			reason_enter(cfg, vm, cause); \
		return 0;                             \
	}

REASON(slot, CAUSE_SLOT, ctx->di)
REASON(recovery, CAUSE_RECOVERY, ctx->di)
REASON(teardown, CAUSE_TEARDOWN, ctx->di)
REASON(teardown_mn, CAUSE_TEARDOWN, ctx->di - O_kvm_mmu_notifier)
REASON(root, CAUSE_ROOT, ctx->di)
REASON(root_work, CAUSE_ROOT, 0)
REASON(guest_write, CAUSE_GUEST_WRITE, PEEK(u64, ctx->di + O_vcpu_kvm))

int kr_reason(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();

	if (st)
		cause_pop(st);
	return 0;
}

/* Aging and dirty logging: on_spte_changed() leaves them to the tracepoint. */
inline_fn void clearing_enter(u64 kvm, u32 cause)
{
	struct config *cfg = armed_config();

	if (cfg && reason_enter(cfg, kvm, cause))
		__sync_fetch_and_add(&cfg->bit_clearers, 1);
}

int kp_reason_aging(struct pt_regs *ctx)
{
	clearing_enter(ctx->di - O_kvm_mmu_notifier, CAUSE_AGING);
	return 0;
}

int kp_reason_dirty_log(struct pt_regs *ctx)
{
	clearing_enter(ctx->di, CAUSE_DIRTY_LOG);
	return 0;
}

int kr_reason_clearing(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();
	int zero = 0;
	struct config *cfg = config.lookup(&zero);
	u32 cause;

	if (!st || !cfg)
		return 0;
	cause = cause_pop(st);
	if (cause == CAUSE_AGING || cause == CAUSE_DIRTY_LOG)
		__sync_fetch_and_add(&cfg->bit_clearers, -1);
	return 0;
}

/* ------------------------------------------------------------------ */
/* mmu notifier: invalidations                                         */

inline_fn void on_invalidate(struct pt_regs *ctx, u64 kvm, u64 range, u32 op)
{
	struct pending *p;

	if (!armed_config() || !range)
		return;
	p = pending_event(scratch(), KIND_INVALIDATE, op, kvm);
	if (!p)
		return;
	p->e.a = PEEK(u64, range + O_range_start);
	p->e.b = PEEK(u64, range + O_range_end);
	p->e.c = PEEK(u64, kvm + O_kvm_invalidate_seq);
	p->e.d = PEEK(u64, kvm + O_kvm_in_progress);
	p->e.cause = PEEK(u32, range + O_range_event);
	send_event(ctx);
}

int kp_invalidate_start(struct pt_regs *ctx)
{
	struct config *cfg = armed_config();
	struct thread_state *st;

	if (!cfg)
		return 0;
	st = reason_enter(cfg, ctx->di - O_kvm_mmu_notifier, CAUSE_NOTIFIER);
	if (st) {
		if (st->arg)
			count_torn(KIND_INVALIDATE);
		st->arg = ctx->si;
		st->arg2 = ctx->di - O_kvm_mmu_notifier;
	}
	return 0;
}

int kr_invalidate_start(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();
	u64 range;

	if (!st || !st->arg)
		return 0;
	cause_pop(st);
	range = st->arg;
	st->arg = 0;
	on_invalidate(ctx, st->arg2, range, OP_START);
	return 0;
}

int kp_invalidate_end(struct pt_regs *ctx)
{
	struct config *cfg = armed_config();
	struct thread_state *st;

	if (!cfg)
		return 0;
	st = thread_get();
	if (st) {
		if (st->arg)
			count_torn(KIND_INVALIDATE);
		st->arg = ctx->si;
		st->arg2 = ctx->di - O_kvm_mmu_notifier;
	}
	return 0;
}

int kr_invalidate_end(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();
	u64 range;

	if (!st || !st->arg)
		return 0;
	range = st->arg;
	st->arg = 0;
	on_invalidate(ctx, st->arg2, range, OP_END);
	return 0;
}

/* ------------------------------------------------------------------ */
/* Pages freed and handed out again                                    */

inline_fn void on_page(void *ctx, u64 page, u32 order, u32 kind)
{
	struct config *cfg = armed_config();
	struct event_record e = {};
	u64 pfn, from;
	u32 vm = 0;

	if (!cfg || !is_page_pointer(page))
		return;
	pfn = page_pfn(page);
	from = kind == KIND_PAGE_FREE ? PAGE_MAPPED : PAGE_FREED;
	if (!move_pages(pfn, order, from, kind == KIND_PAGE_FREE ? PAGE_FREED : 0, &vm))
		return;
	e.h.vm = vm;
	e.h.vcpu = -1;
	e.pfn = pfn;
	e.d = order;
	read_page(pfn, &e.page);
	emit_event(ctx, &e, kind, OP_NONE, RB_NO_WAKEUP);
}

/*
 * kmem:mm_page_free(page, order), kmem:mm_page_alloc(page, order, gfp_flags,
 * migratetype).  The kernel does not run a program inside itself, so a page
 * freed by an interrupt during the program would be missed.  Each tracepoint
 * therefore has a second program, which runs after the first and does the work
 * if the first was skipped: then the page that the first saw last on this cpu
 * is another one.  `rescued` says how many of the first one's missed calls were
 * not lost.
 */
inline_fn void page_call(struct bpf_raw_tracepoint_args *ctx, u32 kind, int again)
{
	int slot = kind == KIND_PAGE_FREE ? RAW_TAIL_FREE : RAW_TAIL_ALLOC;
	struct page_call *call = page_calls.lookup(&slot);

	if (!armed_config() || !call || (again && call->last == ctx->args[0]))
		return;
	if (again)
		call->rescued++;
	else
		call->last = ctx->args[0];
	if (kind == KIND_PAGE_FREE)
		raw_tails.call(ctx, again ? RAW_TAIL_FREE_AGAIN : RAW_TAIL_FREE);
	else
		raw_tails.call(ctx, again ? RAW_TAIL_ALLOC_AGAIN : RAW_TAIL_ALLOC);
}

int raw_tail_free(struct bpf_raw_tracepoint_args *ctx)
{
	on_page(ctx, ctx->args[0], ctx->args[1], KIND_PAGE_FREE);
	return 0;
}

int raw_tail_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	on_page(ctx, ctx->args[0], ctx->args[1], KIND_PAGE_ALLOC);
	return 0;
}

int raw_tracepoint__mm_page_free(struct bpf_raw_tracepoint_args *ctx)
{
	page_call(ctx, KIND_PAGE_FREE, 0);
	return 0;
}

int raw_tracepoint__mm_page_free_again(struct bpf_raw_tracepoint_args *ctx)
{
	page_call(ctx, KIND_PAGE_FREE, 1);
	return 0;
}

int raw_tracepoint__mm_page_alloc(struct bpf_raw_tracepoint_args *ctx)
{
	page_call(ctx, KIND_PAGE_ALLOC, 0);
	return 0;
}

int raw_tracepoint__mm_page_alloc_again(struct bpf_raw_tracepoint_args *ctx)
{
	page_call(ctx, KIND_PAGE_ALLOC, 1);
	return 0;
}

/* ------------------------------------------------------------------ */
/* Pins: kvm_vcpu_map() and the pfn cache                              */

inline_fn void on_pin(struct pt_regs *ctx, u64 kvm, s32 vcpu, u64 gfn, u64 pfn, u64 hva, int ret,
		      u32 op)
{
	struct pending *p;

	if (!armed_config())
		return;
	p = pending_event(scratch(), KIND_PIN, op, kvm);
	if (!p)
		return;
	p->flags = PENDING_PAGE;
	p->e.h.vcpu = vcpu;
	p->e.gfn = gfn;
	p->e.pfn = pfn;
	p->e.b = hva;
	p->e.d = ret;
	send_event(ctx);
}

inline_fn void pin_enter(u64 who, u64 what)
{
	struct thread_state *st;

	if (!armed_config())
		return;
	st = thread_get();
	if (st) {
		if (st->pin_what)
			count_torn(KIND_PIN);
		st->pin_what = what;
		st->pin_who = who;
	}
}

#if HAVE_vcpu_map
inline_fn void on_vcpu_map(struct pt_regs *ctx, u64 vcpu, u64 map, int ret, u32 op)
{
	on_pin(ctx, PEEK(u64, vcpu + O_vcpu_kvm), PEEK(u32, vcpu + O_vcpu_id),
	       PEEK(u64, map + O_map_gfn), PEEK(u64, map + O_map_pfn), PEEK(u64, map + O_map_hva),
	       ret, op);
}

/* kvm_vcpu_map(vcpu, gfn, map), later __kvm_vcpu_map(vcpu, gfn, map, writable) */
int kp_vcpu_map(struct pt_regs *ctx)
{
	pin_enter(ctx->di, ctx->dx);
	return 0;
}

int kr_vcpu_map(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();

	u64 map;

	if (!st || !st->pin_what)
		return 0;
	map = st->pin_what;
	st->pin_what = 0;
	on_vcpu_map(ctx, st->pin_who, map, ctx->ax, OP_MAP);
	return 0;
}

int kp_vcpu_unmap(struct pt_regs *ctx)
{
	struct thread_state *st;

	/* unmapping what is not mapped is allowed and does nothing */
	if (!armed_config() || !PEEK(u64, ctx->si + O_map_hva))
		return 0;
	st = thread_get();
	if (st)
		st->unpin_kvm = PEEK(u64, ctx->di + O_vcpu_kvm);
	on_vcpu_map(ctx, ctx->di, ctx->si, 0, OP_UNMAP);
	return 0;
}

int kr_vcpu_unmap(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();

	if (st)
		st->unpin_kvm = 0;
	return 0;
}
#endif

#if HAVE_gpc
/* __kvm_gpc_refresh(gpc, ...), virt/kvm/pfncache.c */
int kp_gpc(struct pt_regs *ctx)
{
#if V_gpc_arg == 0
	pin_enter(PEEK(u64, ctx->di + O_gpc_kvm), ctx->di);
#else /* 6.1: kvm_gfn_to_pfn_cache_refresh(kvm, gpc, ...) */
	pin_enter(ctx->di, ctx->si);
#endif
	return 0;
}

int kr_gpc(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();
	u64 gpc;

	if (!st || !st->pin_what)
		return 0;
	gpc = st->pin_what;
	st->pin_what = 0;
	on_pin(ctx, st->pin_who, -1, PEEK(u64, gpc + O_gpc_gpa) >> 12, PEEK(u64, gpc + O_gpc_pfn),
	       PEEK(u64, gpc + O_gpc_uhva), ctx->ax, OP_REFRESH);
	return 0;
}
#endif

/* ------------------------------------------------------------------ */
/* Memslots and VMs                                                    */

/* kvm_arch_commit_memory_region(kvm, old, new, change): enum kvm_mr_change */
int kp_commit_slot(struct pt_regs *ctx)
{
	struct config *cfg = armed_config();
	u64 old = ctx->si, new = ctx->dx, change = ctx->cx, slot;
	struct pending *p;
	u32 one = 1;

	if (!cfg)
		return 0;
	reason_enter(cfg, ctx->di, CAUSE_SLOT);
	slot = change == 1 ? old : new;
	if (change == 1)
		slots.delete(&slot);
	else
		slots.update(&slot, &one);
	p = pending_event(scratch(), KIND_SLOT,
			  change == 0 ? OP_CREATE :
			  change == 1 ? OP_DELETE :
			  change == 2 ? OP_MOVE :
					OP_FLAGS,
			  ctx->di);
	if (!p)
		return 0;
	p->flags = PENDING_WAKE;
	p->e.gfn = PEEK(u64, slot + O_slot_base_gfn);
	p->e.a = PEEK(u64, slot + O_slot_npages);
	p->e.b = PEEK(u64, slot + O_slot_hva);
	p->e.c = PEEK(u32, slot + O_slot_flags);
	p->e.d = PEEK(u16, slot + O_slot_id);
	p->e.as_id = PEEK(u16, slot + O_slot_as_id);
	send_event(ctx);
	return 0;
}

/* kvm_arch_init_vm(kvm, type): the VM exists from here on */
int kp_create_vm(struct pt_regs *ctx)
{
	struct config *cfg = armed_config();
	struct vm_entry *vm;
	struct pending *p;
	u64 kvm = ctx->di;

	if (!cfg)
		return 0;
	vms.delete(&kvm); /* an address is reused; a VM number is not */
	vm = vm_of(cfg, kvm);
	if (!vm)
		return 0;
	vm->created = 1;
	p = pending_event(scratch(), KIND_VM, OP_CREATE, kvm);
	if (!p)
		return 0;
	p->flags = PENDING_WAKE;
	p->e.a = kvm;
	p->e.d = vm->tgid;
	send_event(ctx);
	return 0;
}

/* kvm_arch_destroy_vm(kvm): at its return nothing of the VM is mapped any more */
int kp_destroy_vm(struct pt_regs *ctx)
{
	struct config *cfg = armed_config();
	struct thread_state *st;

	if (!cfg)
		return 0;
	st = reason_enter(cfg, ctx->di, CAUSE_TEARDOWN);
	if (st)
		st->dying = ctx->di;
	return 0;
}

int kr_destroy_vm(struct pt_regs *ctx)
{
	struct thread_state *st = thread_find();
	struct vm_entry *vm, last;
	struct pending *p;
	u64 kvm;

	if (!st || !armed_config())
		return 0;
	cause_pop(st);
	kvm = st->dying;
	vm = vms.lookup(&kvm);
	if (!vm)
		return 0;
	last = *vm;
	vms.delete(&kvm);
	if (!last.traced) {
		count_filtered(KIND_VM);
		return 0;
	}
	p = pending_event(scratch(), KIND_VM, OP_DELETE, 0);
	if (!p)
		return 0;
	p->flags = PENDING_WAKE;
	p->e.h.vm = last.id;
	p->e.a = kvm;
	p->e.d = last.tgid;
	send_event(ctx);
	return 0;
}
