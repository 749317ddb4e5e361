/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reading struct page from outside, and remembering which pages guests map.
 * One read covers a whole struct page, so an ordinary page costs one helper
 * call.
 */
#ifndef PFNTRACE_PAGE_H
#define PFNTRACE_PAGE_H

#define PAGE_WORDS (V_PAGE_SIZEOF / 8)
#define PAGE_S32(words, off) (*(s32 *)((char *)(words) + (off)))
#define PAGE_U64(words, off) (*(u64 *)((char *)(words) + (off)))

inline_fn u64 page_addr(u64 pfn)
{
	return V_VMEMMAP + pfn * V_PAGE_SIZEOF;
}

inline_fn u64 page_pfn(u64 page)
{
	return (page - V_VMEMMAP) / V_PAGE_SIZEOF;
}

inline_fn int is_page_pointer(u64 page)
{
	return page >= V_VMEMMAP && page_pfn(page) < (u64)V_PAGE_CHUNKS * PAGE_CHUNK;
}

/*
 * The head of a compound page, from the word that PageTail() tests.  Up to
 * 6.x it is the head's address plus one; Linux 7.x struct page calls it
 * compound_info and may keep a mask there instead, recognised by its high
 * half (include/linux/page-flags.h, _compound_head()).
 */
inline_fn u64 head_of(u64 page, u64 info)
{
	if (info >> 32 == 0xffffffff)
		return page & (info & ~1ULL);
	return info - 1;
}

inline_fn void read_page(u64 pfn, struct page_state *ps)
{
	u64 page = page_addr(pfn), words[PAGE_WORDS] = {};
	u64 info;

	__builtin_memset(ps, 0, sizeof(*ps));
	if (pfn >> 40) /* an error value, not a frame number */
		return;
	if (bpf_probe_read_kernel(words, sizeof(words), (void *)page))
		return;
	/* Never initialised: PagePoisoned(), include/linux/page-flags.h. */
	if (words[0] == ~0ULL)
		return;
	ps->bits = PAGE_HAS_STRUCT;
	ps->mapcount = PAGE_S32(words, O_page_mapcount);
	info = PAGE_U64(words, O_page_compound);
	if (info & 1) {
		ps->bits |= PAGE_TAIL;
		page = head_of(page, info);
		if (bpf_probe_read_kernel(words, sizeof(words), (void *)page))
			return;
	}
	ps->flags = words[O_page_flags / 8];
	ps->refcount = PAGE_S32(words, O_page_refcount);
	if (ps->flags & 1ULL << V_PG_head) {
		if (!(ps->bits & PAGE_TAIL))
			ps->bits |= PAGE_HEAD;
		/* page[1].compound_order, later the low byte of folio._flags_1 */
		ps->order = PEEK(u8, page + O_folio_order);
	}
	if (ps->flags & 1ULL << V_PG_reserved)
		ps->bits |= PAGE_RESERVED;
	if (pfn == V_ZERO_PFN)
		ps->bits |= PAGE_ZERO;
	if (V_ZONE_MASK && (ps->flags >> V_ZONE_SHIFT & V_ZONE_MASK) == V_ZONE_DEVICE)
		ps->bits |= PAGE_ZONE_DEVICE;
}

#endif
