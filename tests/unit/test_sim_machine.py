"""Model and reconstruction side by side, a step at a time: after each one both say the same.

Hypothesis chooses the steps and shrinks what goes wrong to a minimal story. One that once went
wrong stays below under a name. `PFNTRACE_EXAMPLES=1000` looks for longer.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from unit.simmachine import PAGES, VCPUS, Bench

from tracer.simulator.kernels import KERNELS

MEMORY = ("anon", "thp", "shared", "hugetlb", "ttm", "pfnmap", "dax", "readonly")
#: Few pages, so that steps meet: neighbours, both ends, and those of one huge page.
PLACES = st.sampled_from([0, 1, 2, 7, 8, 511, 512, 513, PAGES - 1])
ACCESSES = st.lists(st.tuples(st.integers(0, 1), PLACES, st.booleans()), max_size=VCPUS)
EXAMPLES = int(os.environ.get("PFNTRACE_EXAMPLES", "15"))


class Machine(RuleBasedStateMachine):
    """Steps of a VM's life; vCPUs run while the host works."""

    bench: Bench

    @initialize(
        kernel=st.sampled_from(sorted(KERNELS)),
        mmu=st.sampled_from(["tdp", "shadow"]),
        kinds=st.lists(st.sampled_from(MEMORY), min_size=1, max_size=2),
        seed=st.integers(0, 255),
    )
    def begin(self, kernel, mmu, kinds, seed):
        self.bench = Bench(kernel, mmu, tuple(kinds), seed)

    def meanwhile(self, accesses):
        """Let vCPUs access pages: they start now, and run together with what comes next."""
        for vcpu, (slot, page, write) in enumerate(accesses):
            self.bench.touch(vcpu, self.slot(slot), page, write=write)

    def slot(self, number):
        return number % len(self.bench.mappings)

    @rule(accesses=ACCESSES)
    def touch(self, accesses):
        self.meanwhile(accesses)
        self.bench.run()

    @rule(
        accesses=ACCESSES,
        verb=st.sampled_from(["discard", "storm", "merge", "age", "pin", "pfncache"]),
        slot=st.integers(0, 1),
        pages=st.sampled_from([1, 8, 512, PAGES]),
        times=st.integers(1, 3),
    )
    def invalidate(self, accesses, verb, slot, pages, times):
        self.meanwhile(accesses)
        some = {"pages": pages} if verb in ("discard", "age") else {}
        self.bench.host(verb, self.slot(slot), times=times, every_us=7, **some)
        self.bench.run()

    @rule(accesses=ACCESSES, slot=st.integers(0, 1), rounds=st.integers(0, 2))
    def log_dirty(self, accesses, slot, rounds):
        self.meanwhile(accesses)
        self.bench.host("dirty_log", self.slot(slot), rounds=rounds, every_us=30)
        self.bench.run()

    @rule(accesses=ACCESSES, slot=st.integers(0, 1), moves=st.booleans())
    def change_slot(self, accesses, slot, moves):
        self.meanwhile(accesses)
        self.bench.host("move" if moves else "churn", self.slot(slot), times=1, every_us=20)
        self.bench.run()

    @rule(accesses=ACCESSES, slot=st.integers(0, 1), back=st.booleans())
    def zap_all(self, accesses, slot, back):
        self.meanwhile(accesses)
        self.bench.delete(self.slot(slot))
        self.bench.run()
        if back:
            self.bench.create(self.slot(slot))

    def teardown(self):
        """The VM's process exits at last, and nothing is mapped any more."""
        if hasattr(self, "bench"):
            self.bench.destroy()
            assert self.bench.difference() == ""
            assert not self.bench.leaves()

    @invariant()
    def both_say_the_same(self):
        if hasattr(self, "bench"):
            assert self.bench.difference() == ""


Machine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


def test_a_zap_that_no_record_tells_is_seen():
    # Given a model that forgets to record a zap: this test would be worth nothing if it passed
    bench = Bench("6.12", "tdp", ("anon",))
    bench.touch(0, 0, 7, write=True)
    bench.run()
    assert bench.difference() == "" and len(bench.leaves()) == 1
    bench.vm.root.leaves.clear()

    # Then both sides differ, and the story is told
    told = bench.difference()
    assert told.startswith("open: 1 only in the reconstruction") and "touch(0, 0, 7" in told


def test_two_that_touch_a_page_while_the_host_takes_it_back():
    bench = Bench("v10", "shadow", ("anon", "thp"))
    for vcpu in range(VCPUS):
        bench.touch(vcpu, 0, 511, write=vcpu != 1)
    bench.host("discard", 0, pages=PAGES, times=3, every_us=7)
    bench.run()
    assert bench.difference() == ""
    bench.destroy()
    assert bench.difference() == "" and not bench.leaves()


def test_logging_ends_and_tables_make_room_for_large_leaves():
    # Given 2M leaves that dirty logging split. When it ends, the table goes: on 6.12 its leaves
    # look like those of a deleted slot, and only the change of the slot's flags tells them apart
    for kernel in sorted(KERNELS):
        bench = Bench(kernel, "tdp", ("thp",))
        bench.touch(0, 0, 0, write=False)
        bench.run()
        bench.host("dirty_log", 0, rounds=0, every_us=30)
        bench.run()
        assert bench.difference() == ""
