"""Why a fault failed, in sentences: `analysis.failures` finds the reason, this module words it.

May import: `analysis.document`, `analysis.failures`, `analysis.mappings`, `analysis.text`,
`tracer.describe`.
"""

import errno

from analysis.document import Entry
from analysis.failures import Block, Failure, Head
from analysis.mappings import UNKNOWN_FILE
from analysis.text import duration
from tracer.describe import printable

__all__ = ("errno_name", "explained", "owner")


def errno_name(number: int) -> str:
    """Return for example "EFAULT"; the kernel has numbers of its own, which stay numbers."""
    return errno.errorcode.get(number, f"errno {number}")


def explained(
    failure: Failure,
    *,
    generation: str,
    block: Block | None = None,
    head: Head | None = None,
    destroyed: int | None = None,
) -> Entry:
    """Return what to say of one group of failures: what happened, where, and the evidence.

    `destroyed` is when the VM ended (ns), None if it did not.
    """
    facts = [("where", _where(failure))]
    if failure.reason == "uncounted":
        facts.append(("why", _why_uncounted(failure, generation)))
        evidence = _block_evidence(failure, block, head)
        if evidence:
            facts.append(("block", evidence))
    facts.append(("then", _then(failure, destroyed)))
    lead = f"{owner(failure.vm, failure.tgid)}: {_what(failure)}"
    return Entry(lead, tuple(facts), tone="bad" if failure.died else "warn")


def owner(vm: int, tgid: int) -> str:
    """Return for example "VM 1 (process 219)"; 0 is unknown."""
    name = f"VM {vm}" if vm else "a VM not known"
    return f"{name} (process {tgid})" if tgid else name


def _what(failure: Failure) -> str:
    """Say in one sentence what happened and why."""
    special = {
        "poisoned": f"{_pages(failure)} {_is(failure)} poisoned hardware memory ({failure.error}); "
        "the vCPU's thread gets SIGBUS.",
        "read-only": f"the guest wrote to {_gfns(failure)}, which is read-only for it "
        f"({failure.error}); KVM handed the writes to user space.",
        "signal": "a signal interrupted the fault; KVM_RUN returned EINTR, for user space to "
        "run the vCPU again.",
    }
    if failure.reason in special:
        return special[failure.reason]
    outcome = "the guest died" if failure.died else "KVM_RUN failed"
    if failure.prefetch:
        outcome = "a prefetch failed"
    return f"{outcome} with {errno_name(failure.errno)} because {_because(failure)}."


def _because(failure: Failure) -> str:
    one = failure.gfns <= 1
    behind = printable(failure.mapping or UNKNOWN_FILE)
    known = failure.mapping is not None and failure.mapping.path is not None
    mapped = f"mapped by {behind}" if known else f"in {behind}"
    pages, be = _pages(failure), _is(failure)
    tails = "the uncounted tail of a non-compound block"
    clauses = {
        "uncounted": f"{pages} {be} "
        + (tails if one else "uncounted tails of non-compound blocks")
        + f" {mapped}",
        "free page": f"{pages} {be} free: its owner gave it back while it is {mapped}",
        "count 0": f"{pages} {be} frozen or half freed (count 0, compound or typed), {mapped}",
        "refused": f"KVM refused {pages}, {mapped}",
        "no slot": f"no memslot holds {_gfns(failure)}",
        "early": f"the fault at {_gfns(failure)} ended before fault-in",
        "not asked": f"fault-in of {_gfns(failure)} failed before the host was asked for a page",
        "not seen": f"KVM got no page for {_gfns(failure)} from {behind}, why was not seen (hook "
        "walk is missing)",
        "no memory": f"the host has nothing at hva {failure.hva:#x}, behind {_gfns(failure)}, "
        f"that KVM may {failure.access} ({_behind(failure, behind)})",
        "not mapped": f"KVM found {pages} but could not map it",
    }
    return clauses[failure.reason]


def _behind(failure: Failure, behind: str) -> str:
    return behind if failure.mapping else "no mapping there is known"


def _is(failure: Failure) -> str:
    return "is" if failure.gfns <= 1 else "are"


def _gfns(failure: Failure) -> str:
    if failure.gfns <= 1:
        return f"gfn {failure.gfn:#x}"
    return f"{failure.gfns:,} gfns from {failure.gfn:#x} to {failure.gfn_last:#x}"


def _pages(failure: Failure) -> str:
    return f"the page{'' if failure.gfns <= 1 else 's'} behind {_gfns(failure)}"


def _where(failure: Failure) -> str:
    parts = [f"slot {failure.slot}" if failure.slot is not None else "no slot"]
    if failure.hva:
        parts.append(f"hva {failure.hva:#x}")
    if failure.frame is not None:
        parts.append(f"pfn {failure.frame:#x}")
    parts.append(f"vCPU {failure.vcpu}" if failure.vcpus == 1 else f"{failure.vcpus} vCPUs")
    often = "once" if failure.faults == 1 else f"{failure.faults:,} times"
    return f"{', '.join(parts)}, {failure.access} access, {often}"


def _why_uncounted(failure: Failure, generation: str) -> str:
    return (
        f"KVM of this kernel ({printable(generation)}) takes a reference to the page of every "
        "fault and cannot take one here: the page has count 0, is not part of a compound page and "
        "is not free. Linux 6.13 and later map such pages without a reference."
    )


def _block_evidence(failure: Failure, block: Block | None, head: Head | None) -> str:
    found = []
    if head:
        which = ", right before it," if failure.frame == head.frame + 1 else ""
        found.append(
            f"pfn {head.frame:#x}{which} has count {head.count} and was mapped at gfn "
            f"{head.gfn:#x}: the head."
        )
    if block:
        found.append(
            f"{duration(block.ts - failure.last_ts, 2)} later the block was freed as one: "
            f"{1 << block.order:,} pages (order {block.order}) from pfn {block.frame:#x}."
        )
    return " ".join(found)


def _then(failure: Failure, destroyed: int | None) -> str:
    vcpus = f"vCPU {failure.vcpu}" if failure.vcpus == 1 else "these vCPUs"
    then = f"no later fault of {vcpus} succeeded" if failure.died else f"{vcpus} ran on"
    if destroyed is not None and destroyed > failure.last_ts:
        then += f"; the VM was destroyed {duration(destroyed - failure.last_ts, 2)} later"
    return then
