/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the series "KVM: allow mapping non-refcounted pages" adds to kvm_host.h, restated: version
 * LAB_SERIES of it, with the lab's choices. Nothing here is needed by the rest of the file.
 */
#ifndef LAB_SERIES_H
#define LAB_SERIES_H

/* GUP without waiting would have had to wait. */
#define KVM_PFN_ERR_NEEDS_IO (KVM_PFN_ERR_MASK + 4)

/* A request for the pfn behind a gfn, and what came of it. */
struct kvm_follow_pfn {
	const struct kvm_memory_slot *slot;
	gfn_t gfn;
	/* FOLL_WRITE, FOLL_NOWAIT, FOLL_INTERRUPTIBLE; FOLL_GET: the caller wants the reference. */
	unsigned int flags;
	bool atomic;
	/* A read may come back writable; v7 had another name for it. */
#if LAB_SERIES == 7
#define try_map_writable allow_write_mapping
#endif
	bool try_map_writable;
	/* The caller drops the pfn when the mmu notifier says so. */
	bool guarded_by_mmu_notifier;
#if LAB_SERIES >= 9
	bool allow_non_refcounted_struct_page;
#endif

	hva_t hva;
	bool writable;
#if LAB_SERIES >= 10
	struct page *refcounted_page;
#else
	bool is_refcounted_page;
#endif
};

#if LAB_SERIES >= 10
#define __kvm_follow_pfn kvm_follow_pfn
#endif
kvm_pfn_t __kvm_follow_pfn(struct kvm_follow_pfn *kfp);
kvm_pfn_t hva_to_pfn(struct kvm_follow_pfn *kfp);
void kvm_set_page_accessed(struct page *page);
void kvm_set_page_dirty(struct page *page);

/* The references that fault-in leaves with its caller: v9 all, the others what FOLL_GET asks for. */
static inline bool lab_keeps_reference(unsigned int flags)
{
	return LAB_SERIES == 9 || flags & FOLL_GET;
}

/* May the caller get a page that nobody counts? Before v9 those that ask for no reference may. */
#if LAB_SERIES >= 9
#define LAB_ALLOW_NON_REFCOUNTED(value) .allow_non_refcounted_struct_page = (value),
#define lab_allows_non_refcounted(kfp) ((kfp)->allow_non_refcounted_struct_page)
#else
#define LAB_ALLOW_NON_REFCOUNTED(value)
#define lab_allows_non_refcounted(kfp) (!((kfp)->flags & FOLL_GET))
#endif

static inline struct page *lab_page(const struct kvm_follow_pfn *kfp, kvm_pfn_t pfn)
{
#if LAB_SERIES >= 10
	return kfp->refcounted_page;
#else
	return kfp->is_refcounted_page ? pfn_to_page(pfn) : NULL;
#endif
}
#endif
