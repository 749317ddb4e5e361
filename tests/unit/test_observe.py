"""What is observed of a host: texts of /proc and /sys, bcc's folders, kcore and BTF.

The texts are made up here; BTF is this host's, where it has some.
"""

import gzip
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from probes import hooks
from probes.errors import HostError
from tracer import observe
from tracer.btf import Btf
from tracer.kcore import read_symbols

VMLINUX = Path("/sys/kernel/btf/vmlinux")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a function that writes a file of a made-up host, which is all that observe sees."""

    def rooted(*parts: str) -> Path:
        path = Path(*parts)
        outside = path.is_absolute() and not path.is_relative_to(tmp_path)
        return tmp_path / path.relative_to("/") if outside else path

    monkeypatch.setattr(observe, "Path", rooted)

    def write(path: str, content: str | bytes) -> None:
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


# --- a host that shows nothing --------------------------------------------------------------------


def test_a_host_that_shows_nothing_is_observed_all_the_same(root, monkeypatch):
    def no_btf(*_args):
        raise HostError("no BTF of vmlinux in /sys/kernel/btf")

    monkeypatch.setattr(observe, "Btf", no_btf)
    monkeypatch.setattr(sys, "path", [])
    facts = observe.observe()
    assert (facts.symbols, facts.values, facts.config, facts.modules) == ((), {}, {}, ())
    assert (facts.capabilities, facts.lockdown, facts.max_pfn, facts.kprobes) == ((), "", 0, None)
    assert not (facts.kallsyms or facts.kcore or facts.dev_kvm or facts.btf_vmlinux)
    assert facts.bcc_problem == "not installed"
    assert facts.notes == (
        "/proc/kallsyms: No such file or directory",
        "no BTF of vmlinux in /sys/kernel/btf",
    )


def test_this_host_is_observed_whatever_it_is():
    facts = observe.observe()
    assert facts.release == os.uname().release
    assert facts.cpus == os.cpu_count()


# --- /proc/kallsyms -------------------------------------------------------------------------------

KALLSYMS = """\
ffffffff81000000 T _stext
ffffffff8112c000 t __handle_changed_spte\t[kvm]
ffffffff8112c100 t handle_changed_spte.isra.0\t[kvm]
ffffffff8112c200 t handle_changed_spte.cold\t[kvm]
ffffffff8112c300 t my_handle_changed_spte\t[kvm]
ffffffff8112c400 t handle_changed_spte_more\t[kvm]
ffffffff8112c500 d kvm_vcpu_unmap\t[kvm]
ffffffff8112c600 T hva_to_pfn
ffffffff82a00010 D vmemmap_base
ffffffff82a00018 R page_offset_base_2
ffffffffc0a00020 b shadow_nx_mask\t[kvm]
ffffffffc0a00028 b xshadow_nx_mask\t[kvm]
"""


def kallsyms():
    notes: list[str] = []
    return *observe._kallsyms(notes), notes


def test_no_kallsyms_is_noted(root):
    assert kallsyms() == ((), {}, False, ["/proc/kallsyms: No such file or directory"])


def test_empty_kallsyms_are_none(root):
    root("/proc/kallsyms", "")
    assert kallsyms() == ((), {}, False, [])


def test_functions_and_their_clones_are_found_and_nothing_that_only_looks_like_them(root):
    root("/proc/kallsyms", KALLSYMS)
    symbols, addresses, shown, notes = kallsyms()
    assert symbols == (
        "__handle_changed_spte",
        "handle_changed_spte.cold",
        "handle_changed_spte.isra.0",
        "hva_to_pfn",
    )
    assert addresses == {
        "vmemmap_base": 0xFFFFFFFF82A00010,
        "shadow_nx_mask": 0xFFFFFFFFC0A00020,
    }
    assert (shown, notes) == (True, [])


def test_hidden_addresses_are_noted_and_not_used(root):
    hidden = "".join(f"{'0' * 16}{line[16:]}\n" for line in KALLSYMS.splitlines())
    root("/proc/kallsyms", hidden)
    symbols, addresses, shown, (note,) = kallsyms()
    assert len(symbols) == 4
    assert (addresses, shown) == ({}, False)
    assert "hides addresses (no CAP_SYSLOG, or kptr_restrict=2)" in note


def test_a_kernel_without_data_symbols_has_functions_but_no_addresses(root):
    root("/proc/kallsyms", "ffffffff8112c600 T hva_to_pfn\n")
    assert kallsyms() == (("hva_to_pfn",), {}, True, [])


def test_only_hooks_that_are_on_the_blacklist_are_blacklisted(root):
    root(
        "/sys/kernel/debug/kprobes/blacklist",
        "0xffffffff81e00000-0xffffffff81e00040\thva_to_pfn\n0x1-0x2\tasm_exc_nmi\n",
    )
    assert observe._blacklisted(["hva_to_pfn", "kvm_vcpu_unmap"]) == ("hva_to_pfn",)


# --- small texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("", ""),
        ("none integrity confidentiality\n", ""),
        ("[none] integrity confidentiality\n", "none"),
        ("none integrity [confidentiality]\n", "confidentiality"),
    ],
)
def test_lockdown_is_what_stands_in_brackets(root, text, state):
    assert observe._lockdown() == ""
    root("/sys/kernel/security/lockdown", text)
    assert observe._lockdown() == state


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        ("0000000000000000", ()),
        ("0000004000000000", ("CAP_PERFMON",)),
        ("00000000" + f"{1 << 21 | 1 << 17:08x}", ("CAP_SYS_RAWIO", "CAP_SYS_ADMIN")),
        ("000001ffffffffff", tuple(observe._CAPABILITIES)),
    ],
)
def test_capabilities_are_the_effective_ones(root, mask, names):
    root("/proc/self/status", f"CapPrm:\t000001ffffffffff\nCapEff:\t{mask}\nCapBnd:\t1\n")
    assert observe._capabilities() == names


@pytest.mark.parametrize(
    ("version", "config", "model"),
    [
        ("#1 SMP Debian 6.1", {}, "voluntary"),
        ("#1 SMP PREEMPT Debian", {}, "full"),
        ("#1 SMP PREEMPT_RT Debian", {}, "full"),
        ("#1 SMP PREEMPT_RT Debian", {"CONFIG_PREEMPT_RT": "y"}, "full"),
        ("#1 SMP PREEMPT_DYNAMIC Debian", {}, ""),  # chosen at boot: only debugfs knows
    ],
)
def test_the_preemption_model_comes_from_the_build_where_it_says_it(root, version, config, model):
    assert observe._preempt(version, config) == model


@pytest.mark.parametrize("model", ["none", "voluntary", "full", "lazy"])
def test_the_preemption_model_in_use_is_the_one_in_parentheses(root, model):
    text = " ".join(f"({m})" if m == model else m for m in ("none", "voluntary", "full", "lazy"))
    root("/sys/kernel/debug/sched/preempt", text + "\n")
    assert observe._preempt("#1 SMP PREEMPT_DYNAMIC", {}) == model


CONFIG = 'CONFIG_KVM=m\n# CONFIG_KPROBES is not set\nCONFIG_NODES_SHIFT=10\nCONFIG_LSM="yama"\n'


def test_no_config_says_nothing(root):
    assert observe._config("6.12") == {}
    assert observe._kprobes({}) is None
    root("/proc/config.gz", b"this is not gzip")
    assert observe._config("6.12") == {}


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/boot/config-6.12", CONFIG.encode()),
        ("/lib/modules/6.12/config", CONFIG.encode()),
        ("/proc/config.gz", gzip.compress(CONFIG.encode(), mtime=0)),
    ],
)
def test_the_config_is_found_wherever_it_lies_and_what_is_not_set_is_n(root, path, content):
    root("/boot/config-6.1", "CONFIG_KVM=y\n")
    root(path, content)
    config = observe._config("6.12")
    assert set(config) == set(observe._CONFIG)
    assert (config["CONFIG_KVM"], config["CONFIG_NODES_SHIFT"]) == ("m", "10")
    assert (config["CONFIG_KPROBES"], config["CONFIG_BPF_SYSCALL"]) == ("n", "n")
    assert observe._kprobes(config) is False


def test_kprobes_show_in_the_event_sources_where_there_is_no_config(root):
    root("/sys/bus/event_source/devices/cpu/type", "4\n")
    assert observe._kprobes({}) is False
    root("/sys/bus/event_source/devices/kprobe/type", "8\n")
    assert observe._kprobes({}) is True


def test_the_last_zone_ends_the_frames(root):
    assert observe._max_pfn() == 0
    zones = ((1, 4095), (4096, 1044480), (1048576, 0), (1048576, 262144), (0, 0))
    text = "".join(
        f"Node 0, zone    Z{i}\n  pages free     3840\n        spanned  {spanned}\n"
        f"        present  3998\n  start_pfn:           {start}\n"
        for i, (start, spanned) in enumerate(zones)
    )
    root("/proc/zoneinfo", text)
    assert observe._max_pfn() == 1048576 + 262144


def test_parameters_are_named_by_their_module(root):
    root("/sys/module/kvm/parameters/tdp_mmu", "Y\n")
    root("/sys/module/kvm_amd/parameters/npt", "1\n")
    assert observe._params() == {"kvm.tdp_mmu": "Y", "kvm_amd.npt": "1"}


# --- bcc ------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that makes a folder of packages with these files in its `bcc`."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(observe, "_DIST_PACKAGES", ())

    def make(name: str, *files: str) -> str:
        for file in files:
            path = tmp_path / name / "bcc" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("__version__ = '0.31.0'\n")
        return str(tmp_path / name)

    return make


def test_no_bcc_is_not_installed(packages):
    assert observe.bcc_spec() is None
    assert observe._bcc() == {"bcc_problem": "not installed"}


def test_pypi_s_package_of_that_name_is_told_to_be_unrelated(packages):
    sys.path.append(packages("site-packages", "__init__.py", "codes.py"))
    assert observe.bcc_spec() is None
    (problem,) = observe._bcc().values()
    assert problem.endswith(
        "/site-packages/bcc/__init__.py is PyPI's unrelated package of that name"
    )


def test_a_mere_folder_of_that_name_is_no_package_of_pypi(packages):
    sys.path.append(packages("work", "notes.txt"))
    assert observe.bcc_spec() is None
    assert observe._bcc() == {"bcc_problem": "not installed"}


def test_the_distribution_s_bcc_is_found_behind_pypi_s(packages, monkeypatch):
    # GIVEN a virtual environment with PyPI's, and the system's folder that it does not see
    sys.path.append(packages("site-packages", "__init__.py"))
    system = packages("dist-packages", "__init__.py", "libbcc.py", "version.py")
    monkeypatch.setattr(observe, "_DIST_PACKAGES", (system,))
    # THEN it is found, by its libbcc.py, and not imported
    spec = observe.bcc_spec()
    assert spec.origin == f"{system}/bcc/__init__.py"
    assert spec.submodule_search_locations == [f"{system}/bcc"]
    assert "bcc" not in sys.modules
    found = observe._bcc()
    assert (found["bcc_path"], found["bcc_version"]) == (f"{system}/bcc", "0.31.0")


def test_a_bcc_that_does_not_say_its_version_has_an_unknown_one(packages):
    sys.path.append(packages("there", "__init__.py", "libbcc.py"))
    assert observe._bcc()["bcc_version"] == "unknown"


# --- /proc/kcore ----------------------------------------------------------------------------------

BASE = 0xFFFFFFFF82A00000


def core(path: Path, *segments: tuple[int, int, bytes]) -> Path:
    """Write an ELF core file of (type, virtual address, content)."""
    at = 64 + 56 * len(segments)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0),
    )
    table, body = b"", b""
    for kind, address, content in segments:
        size = len(content)
        table += struct.pack("<IIQQQQQQ", kind, 7, at + len(body), address, 0, size, size, 4096)
        body += content
    path.write_bytes(head + table + body)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF\x02\x01",
        b"\xff" * 64,
        b"no core file at all, but long enough to be taken for one " * 4,
        b"\x7fELF\x02\x01" + b"\xff" * 58,  # ELF, with a table beyond any file
        b"\x7fELF\x01\x01" + bytes(58),  # 32 bit
    ],
)
def test_what_is_not_a_core_file_is_refused(tmp_path, content):
    (tmp_path / "kcore").write_bytes(content)
    with pytest.raises(HostError, match=r"kcore (cannot be read|is not a 64-bit ELF core file)"):
        read_symbols({"zero_pfn": BASE}, hooks.DATA_SYMBOLS, tmp_path / "kcore")


def test_a_core_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(HostError, match=r"none cannot be read: .*No such file or directory"):
        read_symbols({"zero_pfn": BASE}, hooks.DATA_SYMBOLS, tmp_path / "none")


def test_a_core_file_that_must_not_be_opened_is_said_so(tmp_path, monkeypatch):
    def refuse(path: Path, *_args: object, **_named: object) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(HostError, match=r"cannot be read: .*Operation not permitted"):
        read_symbols({"zero_pfn": BASE}, hooks.DATA_SYMBOLS, tmp_path / "kcore")


def test_symbols_are_read_from_the_segment_that_covers_them(tmp_path):
    words = struct.pack("<QQ", 0xFFFFEA0000000000, 0x1234) + b"\x01\xff"
    path = core(
        tmp_path / "kcore",
        (4, BASE, b"\xee" * 64),  # PT_NOTE: no memory, whatever its address
        (1, 0xFFFF888000000000, b"\xdd" * 32),
        (1, BASE, words),
    )
    addresses = {
        "vmemmap_base": BASE,
        "zero_pfn": BASE + 8,
        "tdp_enabled": BASE + 16,
        "shadow_nx_mask": BASE + 0x1000,  # covered by none
    }
    assert read_symbols(addresses, hooks.DATA_SYMBOLS, path) == {
        "vmemmap_base": 0xFFFFEA0000000000,
        "zero_pfn": 0x1234,
        "tdp_enabled": 1,  # one byte, not its neighbour
    }


def test_a_value_that_is_cut_off_is_no_value(tmp_path):
    path = core(tmp_path / "kcore", (1, BASE, bytes(16)))
    path.write_bytes(path.read_bytes()[:-4])
    addresses = {"vmemmap_base": BASE, "zero_pfn": BASE + 8}
    assert read_symbols(addresses, hooks.DATA_SYMBOLS, path) == {"vmemmap_base": 0}


# --- BTF ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def btf() -> Iterator[Btf]:
    if not os.access(VMLINUX, os.R_OK):
        pytest.skip(f"{VMLINUX} is not there or not readable")
    try:
        base = Btf()
    except HostError as err:
        pytest.skip(f"no BTF to read: {err}")
    yield base
    base.close()


def test_what_btf_does_not_know_is_empty(btf):
    assert btf.struct("no_such_struct", ["x"]) == {}
    assert btf.parameters("no_such_function") is None
    assert btf.enum("no_such_enum") == {}
    assert btf.has_typedef("no_such_typedef") is False
    assert btf.anonymous_enums(["NO_SUCH_CONSTANT"]) == {}


def test_a_module_without_btf_is_an_error_for_the_host(btf):
    with pytest.raises(HostError, match="no BTF of no_such_module"):
        Btf("no_such_module", btf)


def test_closing_twice_does_no_harm(btf):
    other = Btf()
    other.close()
    other.close()
    assert other.handle == 0


def test_a_member_that_does_not_exist_is_left_out(btf):
    assert set(btf.struct("page", ["flags", "no_such_member"])) == {"", "flags"}


@pytest.mark.parametrize("name", ["page", "mm_struct", "task_struct", "vm_area_struct", "inode"])
def test_members_lie_within_their_structure(btf, name):
    places = btf.struct(name, hooks.STRUCTS[name])
    whole = places.pop("")
    assert (whole.bit, whole.bits % 8) == (0, 0)
    assert places
    for place in places.values():
        assert place.bits > 0
        assert 0 <= place.bit <= place.bit + place.bits <= whole.bits


def test_the_page_is_laid_out_as_every_kernel_has_it(btf):
    page = btf.struct("page", hooks.STRUCTS["page"])
    assert page[""].bits // 8 in (56, 64, 80, 96, 128)
    assert (page["flags"].offset, page["flags"].bits) == (0, 64)
    # Members of the anonymous unions count as the page's own.
    assert (page["_refcount"].bits, page["_mapcount"].bits) == (32, 32)
    assert page["_refcount"].offset == page["_mapcount"].offset + 4
    head = page.get("compound_head") or page["compound_info"]
    assert head.offset == 8


def test_enumerations_and_functions_are_read(btf):
    flags = btf.enum("pageflags")
    assert flags["PG_locked"] == 0
    assert {"PG_head", "PG_reserved"} <= set(flags)
    assert btf.enum("zone_type")["__MAX_NR_ZONES"] > 2
    assert btf.parameters("vfs_read") == ("file", "buf", "count", "pos")
    assert btf.has_typedef("pid_t") is True
