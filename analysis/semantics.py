"""What each generation of KVM's fault path promises about references, as data.

Chosen from what the recorder saw in the kernel (struct members, hooks, data symbols), never from
a version number. The sources of each promise, all of arch/x86/kvm/mmu and virt/kvm:

G0a, G0b  Linux 6.1, 6.12: hva_to_pfn() takes a reference for every page that has a struct page;
          direct_page_fault(), kvm_tdp_mmu_page_fault() and FNAME(page_fault) give it back with
          kvm_release_pfn_clean() after unlocking. Since Linux d02c357e5bfa ("KVM: x86/mmu: Retry
          fault before acquiring mmu_lock if mapping is changing") (v6.8) kvm_faultin_pfn() itself
          does so when it retries. A page with count 0 is refused: Linux f8be156be163 ("KVM: do
          not allow mapping valid but non-reference-counted pages") (v5.13).
G1        the out-of-tree series "KVM: allow mapping non-refcounted pages". v7, v8, v10 and v11 put
          the page before fault-in returns; v9 as corrected puts it at the end of the fault, v9 as
          mailed never does.
G2        Linux 6.13 and later: Linux 8dd861cc07e2 ("KVM: x86/mmu: Put refcounted pages instead of
          blindly releasing pfns"): kvm_mmu_finish_page_fault() puts what get_user_pages() gave,
          under mmu_lock. PFNMAP pages get no reference.
May import: `probes.facts`.
"""

import dataclasses
from collections.abc import Collection

from probes.facts import KernelFacts, series_version

__all__ = ("PUT_CALLS", "MARK_CALLS", "Semantics", "semantics_of")

#: RELEASE calls that drop a reference, and those that only mark the page accessed or dirty.
PUT_CALLS = ("pfn_clean", "pfn_dirty", "page_clean", "page_dirty", "finish_fault")
MARK_CALLS = ("mark_accessed", "mark_dirty")

#: SPTE_MMU_PAGE_REFCOUNTED of the series, arch/x86/kvm/mmu/spte.h (v7 to v11).
_REFCOUNTED_BIT = 1 << 59


@dataclasses.dataclass(frozen=True, slots=True)
class Semantics:
    """The promises of one kernel.

    `put` is where the reference of a fault ends: "in fault" (one RELEASE in every fault that got a
    counted page), "at fault-in" (gone when the fault-in function returns, no RELEASE), "either"
    (a version of the series whose structures do not tell which of both) or "unknown".
    """

    generation: str
    put: str
    #: hooks that see the puts of faults; without one of them a missing put means nothing.
    put_hooks: tuple[str, ...]
    #: the function that puts, as a reader of the kernel knows it.
    put_function: str
    #: the function that puts what was prefetched around a fault.
    prefetch_function: str
    #: does KVM take a reference to a page that it found by walking a PFNMAP mapping?
    counts_pfnmap: bool
    #: does it refuse such a page if its count is 0?
    refuses_uncounted: bool
    #: does FAULT.refcounted say whether the kernel counts the page?
    says_refcounted: bool
    #: the SPTE bit that says so, 0 if there is none.
    spte_bit: int
    #: does KVM touch struct page again (accessed, dirty) when an SPTE is zapped or aged?
    marks_at_zap: bool
    #: does a page prefetched around a fault show a put of its own?
    prefetch_puts: bool


_UNKNOWN = Semantics("unknown", "unknown", (), "", "", False, False, False, 0, False, False)


def semantics_of(generation: str, hooks: Collection[str], facts: KernelFacts) -> Semantics:
    """Return what a kernel of a generation with some hooks attached promises."""
    if generation in ("G0a", "G0b"):
        return Semantics(
            generation=generation,
            put="in fault",
            put_hooks=("release_pfn_clean",),
            put_function="kvm_release_pfn_clean",
            prefetch_function="direct_pte_prefetch_many",
            counts_pfnmap=True,
            refuses_uncounted=True,
            says_refcounted=False,
            spte_bit=0,
            marks_at_zap=True,
            prefetch_puts=False,
        )
    if generation == "G1":
        return _of_series(hooks, facts)
    if generation == "G2":
        return Semantics(
            generation=generation,
            put="in fault",
            put_hooks=("finish_fault",),
            put_function="kvm_mmu_finish_page_fault",
            prefetch_function="kvm_mmu_prefetch_sptes",
            counts_pfnmap=False,
            refuses_uncounted=False,
            says_refcounted=True,
            spte_bit=0,
            marks_at_zap=False,
            prefetch_puts="release_page_dirty" in hooks,
        )
    return dataclasses.replace(_UNKNOWN, generation=generation)


def _of_series(hooks: Collection[str], facts: KernelFacts) -> Semantics:
    # v10 and v11 have kvm_page_fault.accessed_page, v7 to v9 is_refcounted_page; v11 has the mask.
    named = facts.has_field("kvm_page_fault", "is_refcounted_page")
    masked = facts.values.get("shadow_refcounted_mask")
    put = _put_of_series(facts)
    return Semantics(
        generation="G1",
        put=put,
        put_hooks=("release_page_clean",),
        put_function="kvm_follow_refcounted_pfn"
        if put == "at fault-in"
        else "kvm_release_page_clean",
        prefetch_function="direct_pte_prefetch_many",
        counts_pfnmap=True,
        refuses_uncounted=False,
        says_refcounted=named,
        spte_bit=_REFCOUNTED_BIT if masked is None else masked,
        marks_at_zap=True,
        prefetch_puts=False,
    )


def _put_of_series(facts: KernelFacts) -> str:
    """Return where a version of the series puts: v9 in the fault, as mailed nowhere."""
    version = series_version(facts)
    if not version:
        return (
            "either" if facts.has_field("kvm_page_fault", "is_refcounted_page") else "at fault-in"
        )
    return "in fault" if version == "v9" else "at fault-in"
