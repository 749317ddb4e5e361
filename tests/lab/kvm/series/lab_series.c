// SPDX-License-Identifier: GPL-2.0
/*
 * The gfn to pfn part of the series, restated for Linux 6.12 and included by kvm_main.c in place of
 * hva_to_pfn() and its helpers. See lab_series.h.
 */

/* May a caller that no mmu notifier guards use a pfn that nothing keeps alive? */
static bool allow_unsafe_mappings;
#if LAB_SERIES >= 9
module_param(allow_unsafe_mappings, bool, 0444);
#endif

/* A page that fault-in holds a reference of: hand it over or give it back. */
static kvm_pfn_t kvm_follow_refcounted_pfn(struct kvm_follow_pfn *kfp, struct page *page)
{
	kvm_pfn_t pfn = page_to_pfn(page);

#if LAB_SERIES >= 10
	kfp->refcounted_page = page;
#else
	kfp->is_refcounted_page = true;
#endif
	if (!lab_keeps_reference(kfp->flags))
		put_page(page);
	return pfn;
}

static bool hva_to_pfn_fast(struct kvm_follow_pfn *kfp, kvm_pfn_t *pfn)
{
	struct page *page;

	if (!(kfp->flags & FOLL_WRITE) && !kfp->try_map_writable)
		return false;
	if (!get_user_page_fast_only(kfp->hva, FOLL_WRITE, &page))
		return false;
	kfp->writable = true;
	*pfn = kvm_follow_refcounted_pfn(kfp, page);
	return true;
}

static int hva_to_pfn_slow(struct kvm_follow_pfn *kfp, kvm_pfn_t *pfn)
{
	unsigned int asked = kfp->flags & (FOLL_WRITE | FOLL_NOWAIT | FOLL_INTERRUPTIBLE);
	struct page *page, *writable;
	int got;

	might_sleep();
	kfp->writable = kfp->flags & FOLL_WRITE;
	got = get_user_pages_unlocked(kfp->hva, 1, &page,
				      asked | FOLL_HWPOISON | FOLL_HONOR_NUMA_FAULT);
	if (got != 1)
		return got;
	if (!kfp->writable && kfp->try_map_writable &&
	    get_user_page_fast_only(kfp->hva, FOLL_WRITE, &writable)) {
		put_page(page);
		page = writable;
		kfp->writable = true;
	}
	*pfn = kvm_follow_refcounted_pfn(kfp, page);
	return 1;
}

static int hva_to_pfn_remapped(struct vm_area_struct *vma, struct kvm_follow_pfn *kfp,
			       kvm_pfn_t *found)
{
	struct follow_pfnmap_args walk = { .vma = vma, .address = kfp->hva };
	bool write = kfp->flags & FOLL_WRITE, unlocked = false, refcounted = false;
	struct page *page;
	int error = follow_pfnmap_start(&walk);

	if (error) {
		error = fixup_user_fault(current->mm, kfp->hva, write ? FAULT_FLAG_WRITE : 0,
					 &unlocked);
		if (unlocked)
			return -EAGAIN;
		error = error ?: follow_pfnmap_start(&walk);
		if (error)
			return error;
	}
	if (write && !walk.writable) {
		*found = KVM_PFN_ERR_RO_FAULT;
		goto out;
	}
	kfp->writable = walk.writable;
	*found = walk.pfn;
	page = kvm_pfn_to_refcounted_page(walk.pfn);
	if (page && get_page_unless_zero(page)) {
		refcounted = true;
		*found = kvm_follow_refcounted_pfn(kfp, page);
	} else if (page && !lab_allows_non_refcounted(kfp)) {
		/* A struct page that nobody counts: the caller could not tell. */
		error = -EFAULT;
	}
	/* v7 refused only who asked for a reference that could not be had. */
	if (LAB_SERIES > 7 && !refcounted && !kfp->guarded_by_mmu_notifier &&
	    !allow_unsafe_mappings)
		error = -EFAULT;
out:
	follow_pfnmap_end(&walk);
	return error;
}

kvm_pfn_t hva_to_pfn(struct kvm_follow_pfn *kfp)
{
	bool write = kfp->flags & FOLL_WRITE, nowait = kfp->flags & FOLL_NOWAIT;
	struct vm_area_struct *vma;
	kvm_pfn_t pfn = KVM_PFN_ERR_FAULT;
	int result;

	if (hva_to_pfn_fast(kfp, &pfn))
		return pfn;
	if (kfp->atomic)
		return KVM_PFN_ERR_FAULT;
	result = hva_to_pfn_slow(kfp, &pfn);
	if (result == 1)
		return pfn;
	if (result == -EINTR)
		return KVM_PFN_ERR_SIGPENDING;

	pfn = KVM_PFN_ERR_FAULT;
	mmap_read_lock(current->mm);
	if (result == -EHWPOISON || (!nowait && check_user_page_hwpoison(kfp->hva))) {
		pfn = KVM_PFN_ERR_HWPOISON;
		goto out;
	}
	do {
		result = 0;
		vma = vma_lookup(current->mm, kfp->hva);
		if (vma && vma->vm_flags & (VM_IO | VM_PFNMAP)) {
			result = hva_to_pfn_remapped(vma, kfp, &pfn);
			if (result < 0)
				pfn = KVM_PFN_ERR_FAULT;
		} else if (vma && nowait && vma_is_valid(vma, write)) {
			pfn = KVM_PFN_ERR_NEEDS_IO;
		}
	} while (result == -EAGAIN);
out:
	mmap_read_unlock(current->mm);
	return pfn;
}

kvm_pfn_t __kvm_follow_pfn(struct kvm_follow_pfn *kfp)
{
	kfp->writable = false;
#if LAB_SERIES >= 10
	kfp->refcounted_page = NULL;
#else
	kfp->is_refcounted_page = false;
#endif
	kfp->hva = __gfn_to_hva_many(kfp->slot, kfp->gfn, NULL, kfp->flags & FOLL_WRITE);
	if (kfp->hva == KVM_HVA_ERR_RO_BAD)
		return KVM_PFN_ERR_RO_FAULT;
	if (kvm_is_error_hva(kfp->hva))
		return KVM_PFN_NOSLOT;
	if (memslot_is_readonly(kfp->slot))
		kfp->try_map_writable = false;
	return hva_to_pfn(kfp);
}
EXPORT_SYMBOL_GPL(__kvm_follow_pfn);

/*
 * Callers that were not converted: they get a reference, and no page without one. Nothing tells
 * them of an invalidation (KVM-FACTS 2.4), so that PCI memory is not for them either from v8 on.
 */
kvm_pfn_t __gfn_to_pfn_memslot(const struct kvm_memory_slot *slot, gfn_t gfn, bool atomic,
			       bool interruptible, bool *async, bool write_fault,
			       bool *writable, hva_t *hva)
{
	struct kvm_follow_pfn kfp = {
		.slot = slot,
		.gfn = gfn,
		.flags = FOLL_GET | (write_fault ? FOLL_WRITE : 0) |
			 (async ? FOLL_NOWAIT : 0) | (interruptible ? FOLL_INTERRUPTIBLE : 0),
		.atomic = atomic,
		.try_map_writable = writable,
	};
	kvm_pfn_t pfn = __kvm_follow_pfn(&kfp);

	if (pfn == KVM_PFN_ERR_NEEDS_IO) {
		*async = true;
		pfn = KVM_PFN_ERR_FAULT;
	}
	if (writable)
		*writable = kfp.writable;
	if (hva)
		*hva = kfp.hva;
	return pfn;
}
