"""Nothing changed: KVM rebuilt as it is.

In which generation: 6.12 and 7.3. It stands for no bug: its ``.text`` is Debian's byte for byte,
so that whatever a changed KVM shows is the change's doing, not the compiler's. A trace must show
nothing.
"""

from ..kvmchange import Change

CHANGE = Change(
    name="unchanged",
    title="nothing",
    stands_for="Debian's own module, compiled here",
    shows="no finding",
    workload="prime-guest --repeat 3",
    found_by=(),
    edits={"6.12": (), "7.3": ()},
    planted=False,
)
