"""The only module that imports bcc: load the programs, attach them, read the maps.

`KernelSide` offers what a session needs and hides the rest: file descriptors of the rings,
counters as plain integers, VM entries as tuples. May import: bcc (lazily), `probes`,
`tracer.observe`.
"""

import contextlib
import ctypes
import ctypes.util
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from probes.errors import ProbeLoadError
from probes.profile import BPF_SOURCE, KernelProfile
from probes.wire import KINDS
from tracer.observe import bcc_spec

__all__ = ("RAW_TAILS", "Counts", "KernelSide", "Settings", "VmEntry")

#: The program of each entry of the map raw_tails: RAW_TAIL_x of state.h, in that order.
RAW_TAILS = (*("raw_tail_free", "raw_tail_alloc") * 2, *("raw_tail_event",) * 2)

_ALL_GFNS = (0, 2**64 - 1)


class Settings(NamedTuple):
    """What the programs are compiled and configured for."""

    rings: int
    fault_ring_bytes: int
    event_ring_bytes: int
    stacks: bool = False
    pids: tuple[int, ...] = ()
    gfns: tuple[int, int] = _ALL_GFNS


class Counts(NamedTuple):
    """Loss accounting of one kind, summed over cpus: produced = written + lost + filtered."""

    produced: int = 0
    lost: int = 0
    filtered: int = 0
    torn: int = 0


class VmEntry(NamedTuple):
    """One VM that the programs have met."""

    vm: int
    kvm: int
    tgid: int
    traced: bool
    created: bool


def _import_bcc() -> ModuleType:
    """Import iovisor's bcc from the distribution, also from inside a virtual environment."""
    if "bcc" in sys.modules:
        return sys.modules["bcc"]
    spec = bcc_spec()
    if spec is None or spec.loader is None:
        raise ProbeLoadError("bcc is not installed: apt install python3-bpfcc")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as err:
        del sys.modules["bcc"]
        raise ProbeLoadError(
            f"bcc at {spec.origin} does not import ({err}): apt install --reinstall python3-bpfcc"
        ) from err
    return module


def _cflags(profile: KernelProfile, settings: Settings) -> list[str]:
    page = os.sysconf("SC_PAGE_SIZE")
    defines = {
        **profile.defines,
        "V_RINGS": str(settings.rings),
        "V_FAULT_RING_PAGES": str(settings.fault_ring_bytes // page),
        "V_EVENT_RING_PAGES": str(settings.event_ring_bytes // page),
        "WANT_STACKS": str(int(settings.stacks)),
    }
    flags = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    # bcc optimises what clang hands over, so clang need not: a third of the compile time. HAVE_ and
    # FENTRY_ switches that are not given read as 0, on purpose.
    lazy = ["-Xclang", "-disable-llvm-passes", "-g0"]
    return [f"-I{BPF_SOURCE.parent}", *flags, *lazy, "-Wno-undef", "-Wno-unused-function"]


class KernelSide:
    """The loaded programs. Verbs in the order they are called: load, attach, arm, …, close."""

    def __init__(self, profile: KernelProfile, settings: Settings) -> None:
        self._profile = profile
        self._settings = settings
        self._bpf: Any = None
        self.failed: list[tuple[str, str, str]] = []
        self._copies: list[Any] = []
        #: program -> calls skipped by the kernel, before the programs were armed and when they were
        #: stopped
        self._skipped_before: dict[str, int] = {}
        self._skipped: dict[str, int] = {}

    def load(self) -> None:
        """Compile and make the maps. Raises ProbeLoadError with the compiler's first error."""
        # bcc asks for a kernel source tree even of a program that includes no kernel header.
        os.environ["BCC_KERNEL_SOURCE"] = str(BPF_SOURCE.parent / "stub")
        bcc = _import_bcc()

        class Programs(bcc.BPF):  # type: ignore[misc,name-defined]
            # bcc attaches by function name on its own; the profile decides instead.
            def _trace_autoload(self) -> None:
                return

        with _captured_stderr() as said:
            try:
                self._bpf = Programs(
                    src_file=str(BPF_SOURCE).encode(), cflags=_cflags(self._profile, self._settings)
                )
            except Exception as err:
                first = next((line for line in said() if "error" in line), str(err))
                if "could not open bpf map" in first:
                    raise ProbeLoadError(
                        f"the kernel refused a map ({first}): lower --buffer-size"
                    ) from err
                raise ProbeLoadError(f"the probes do not compile: {first}; report this") from err
            try:
                self._fill_tails()
            except Exception as err:
                raise ProbeLoadError(f"the kernel refused the programs: {_last(said())}") from err
        self._configure()

    def _configure(self) -> None:
        config = self._bpf["config"]
        leaf = config.Leaf()
        leaf.gfn_lo, leaf.gfn_hi = self._settings.gfns
        leaf.n_pids = len(self._settings.pids)
        config[0] = leaf
        for pid in self._settings.pids:
            self._bpf["pids"][ctypes.c_uint32(pid)] = ctypes.c_uint8(1)

    def _fill_tails(self) -> None:
        # Programs that write an event end in one of these, by kind of program: a tail call cannot
        # cross from a kprobe to a tracepoint.
        kinds = {
            "tails": (self._bpf.KPROBE, ("tail_event",)),
            "raw_tails": (self._bpf.RAW_TRACEPOINT, RAW_TAILS),
        }
        for table, (kind, names) in kinds.items():
            for index, name in enumerate(names):
                program = self._bpf.load_func(name, kind)
                # bcc remembers what it loaded: forgotten, the next caller gets a copy of its own.
                self._copies.append(self._bpf.funcs.pop(name.encode()))
                self._bpf[table][ctypes.c_int(index)] = ctypes.c_int(program.fd)

    def attach(self) -> None:
        """Attach everything in the profile; what an optional hook refuses is kept in `failed`.

        Raises ProbeLoadError when a required hook is refused.
        """
        required = {h.name for h in _required_hooks()}
        for a in self._profile.attachments:
            with _captured_stderr() as said:
                try:
                    self._attach_one(a.how, a.symbol, a.program)
                except Exception as err:
                    reason = _last(said()) or str(err)
                    self.failed.append((a.hook, a.symbol, reason))
                    if a.hook in required:
                        raise ProbeLoadError(
                            f"{a.how} on {a.symbol} was refused: {reason}; "
                            "run 'pfntrace doctor' for what this host lacks"
                        ) from err

    def _attach_one(self, how: str, symbol: str, program: str) -> None:
        bpf = self._bpf
        if how == "kprobe":
            bpf.attach_kprobe(event=symbol, fn_name=program)
        elif how == "kretprobe":
            bpf.attach_kretprobe(event=symbol, fn_name=program)
        elif how == "fentry":
            bpf.attach_kfunc(fn_name=program.encode())
        elif how == "fexit":
            bpf.attach_kretfunc(fn_name=program.encode())
        else:
            bpf.attach_raw_tracepoint(tp=symbol.encode(), fn_name=program.encode())
            # bcc keeps one program per tracepoint: file it under its own name.
            attached = bpf.raw_tracepoint_fds
            attached[program.encode()] = attached.pop(symbol.encode())

    def arm(self, *, armed: bool = True) -> None:
        """Let the programs write, or stop them; every program tests this first."""
        if armed:
            self._skipped_before = self._skips()
        leaf = self._bpf["config"][0]
        leaf.armed = int(armed)
        self._bpf["config"][0] = leaf
        if not armed:
            self._skipped = self._skips()

    def ring_fds(self) -> list[tuple[str, int]]:
        """Return (record type, map file descriptor) of every ring."""
        return [
            (kind, self._bpf[f"{kind}{i}"].map_fd)
            for kind in ("faults", "events")
            for i in range(self._settings.rings)
        ]

    def counts(self) -> dict[str, list[Counts]]:
        """Return the counters by kind, one entry per possible cpu."""
        table = self._bpf["counts"]
        found: dict[str, list[Counts]] = {}
        for number, name in enumerate(KINDS):
            if number:
                values = table[ctypes.c_int(number)]
                found[name] = [Counts(v.produced, v.lost, v.filtered, v.torn) for v in values]
        return found

    def missed(self) -> dict[str, int]:
        """Return program -> calls that the kernel did not run it for while it was armed, if any.

        Calls that a second program took over are not missed, nor those before or after: nothing
        would have been written.
        """
        found = {
            name: count - self._skipped_before.get(name, 0) - self._rescued(name)
            for name, count in self._skipped.items()
        }
        return {name: count for name, count in found.items() if count > 0}

    def _skips(self) -> dict[str, int]:
        """Return program -> calls for which the kernel has not run it since it was loaded.

        The kernel refuses to run a program inside itself and counts that (recursion_misses,
        kernel/bpf/syscall.c, bpf_prog_show_fdinfo()).
        """
        found = {}
        for name, program in self._bpf.funcs.items():
            text = Path(f"/proc/self/fdinfo/{program.fd}").read_text()
            match = re.search(r"^recursion_misses:\s*(\d+)", text, re.M)
            if match and not name.endswith(b"_again"):
                found[name.decode()] = int(match[1])
        return found

    def _rescued(self, program: str) -> int:
        """Return how many missed calls of a program its second one took over."""
        events = ("mm_page_free", "mm_page_alloc")
        event = program.removeprefix("raw_tracepoint__")
        if event not in events:
            return 0
        return sum(c.rescued for c in self._bpf["page_calls"][ctypes.c_int(events.index(event))])

    def open_faults(self) -> int:
        """Return how many faults of VMs that are gone never ended, as far as the programs know."""
        alive = {vm.vm for vm in self.vms()}
        states = self._entries("threads")
        return sum(1 for _, state in states if state.fault and state.vm not in alive)

    def _entries(self, table: str) -> Iterator[tuple[Any, Any]]:
        """Yield the entries of a map that programs change meanwhile: bcc's items() would raise."""
        for key in list(self._bpf[table].keys()):
            with contextlib.suppress(KeyError):
                yield key, self._bpf[table][key]

    def vms(self) -> list[VmEntry]:
        """Return the VMs that are in the programs' table now."""
        return [
            VmEntry(leaf.id, key.value, leaf.tgid, bool(leaf.traced), bool(leaf.created))
            for key, leaf in self._entries("vms")
        ]

    def stack(self, stack_id: int) -> list[str]:
        """Return the symbols of one kernel stack, innermost first."""
        return [
            self._bpf.ksym(address, show_module=True, show_offset=True).decode()
            for address in self._bpf["stacks"].walk(stack_id)
        ]

    def close(self) -> None:
        """Detach and free everything; the kernel does the same if the process dies."""
        if self._bpf is not None:
            self._bpf.cleanup()
            self._bpf = None
            for program in self._copies:
                os.close(program.fd)
            self._copies.clear()


def _last(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if line), "")


def _required_hooks() -> list[Any]:
    from probes.hooks import HOOKS

    return [h for h in HOOKS if h.required]


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Any]:
    """Catch what libbcc prints straight to fd 2; give it back as lines."""
    libc = ctypes.CDLL(None)
    saved = os.dup(2)
    capture = os.memfd_create("stderr")
    sys.stderr.flush()
    os.dup2(capture, 2)

    def said() -> list[str]:
        libc.fflush(None)
        size = os.lseek(capture, 0, os.SEEK_END)
        return os.pread(capture, min(size, 1 << 20), 0).decode(errors="replace").splitlines()

    try:
        yield said
    finally:
        libc.fflush(None)
        os.dup2(saved, 2)
        os.close(saved)
        os.close(capture)
