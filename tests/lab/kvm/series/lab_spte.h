/* SPDX-License-Identifier: GPL-2.0 */
/* The series' bit of an SPTE, and what is done by it. Included by spte.h; see lab_series.h. */
#define SPTE_MMU_PAGE_REFCOUNTED BIT_ULL(59)

#if LAB_SERIES >= 11
extern u64 shadow_refcounted_mask;
#endif

/* Up to v9 the bit was set whatever the page tables have room for. */
static inline bool lab_has_refcount_bit(void)
{
	return LAB_SERIES < 10 || tdp_enabled;
}

static inline u64 lab_refcounted_mask(bool is_refcounted)
{
	if (!is_refcounted)
		return 0;
#if LAB_SERIES >= 11
	return shadow_refcounted_mask;
#else
	return lab_has_refcount_bit() ? SPTE_MMU_PAGE_REFCOUNTED : 0;
#endif
}

static inline bool is_refcounted_page_spte(u64 spte)
{
	return !lab_has_refcount_bit() || spte & SPTE_MMU_PAGE_REFCOUNTED;
}

static inline void lab_spte_set_accessed(u64 spte)
{
	if (is_refcounted_page_spte(spte) && pfn_valid(spte_to_pfn(spte)))
		kvm_set_page_accessed(pfn_to_page(spte_to_pfn(spte)));
}

static inline void lab_spte_set_dirty(u64 spte)
{
	if (is_refcounted_page_spte(spte) && pfn_valid(spte_to_pfn(spte)))
		kvm_set_page_dirty(pfn_to_page(spte_to_pfn(spte)));
}

static inline struct page *lab_spte_page(u64 spte)
{
	return is_refcounted_page_spte(spte) ? kvm_pfn_to_refcounted_page(spte_to_pfn(spte)) : NULL;
}

/* What a fault knows of its page. */
#if LAB_SERIES >= 10
#define LAB_PAGE(fault, pfn) ((fault)->accessed_page)
#define LAB_REFCOUNTED(fault) (!!(fault)->accessed_page)
#else
#define LAB_PAGE(fault, pfn) ((fault)->is_refcounted_page ? pfn_to_page(pfn) : NULL)
#define LAB_REFCOUNTED(fault) ((fault)->is_refcounted_page)
#endif
