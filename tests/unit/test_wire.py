"""The wire format is declared twice, in C and for numpy: here the two are compared.

`wire.h` is read for its names, compiled for its offsets and values, and must then say the same as
`probes.wire`, field by field and constant by constant, with nothing over on either side.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from probes import wire

pytestmark = pytest.mark.cc

HEADER = Path(wire.__file__).parent / "bpf" / "wire.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
#: struct of wire.h -> its dtype.
DTYPES = {
    "page_state": wire.PAGE_STATE,
    "record_header": wire.HEADER,
    "fault_record": wire.FAULT,
    "event_record": wire.EVENT,
}


def c_structs() -> dict[str, list[str]]:
    """Return struct -> member names, as wire.h declares them."""
    found = {}
    for name, body in re.findall(r"struct (\w+) \{\n(.*?)\n\};", TEXT, re.S):
        found[name] = re.findall(r"(\w+)(?:\[\d+\])?;", body)
    return found


def c_enums() -> dict[str, list[str]]:
    """Return enum -> constant names, as wire.h declares them."""
    bodies = re.findall(r"enum (\w+) \{\n(.*?)\n\};", TEXT, re.S)
    return {name: re.findall(r"^\s*(\w+) =", body, re.M) for name, body in bodies}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, int]:
    """Compile wire.h and return what the compiler makes of every name in it."""
    wanted = {"FAULT_RECORD_SIZE": "FAULT_RECORD_SIZE", "EVENT_RECORD_SIZE": "EVENT_RECORD_SIZE"}
    for struct, members in c_structs().items():
        wanted[struct] = f"sizeof(struct {struct})"
        for member in members:
            place = f"((struct {struct} *)0)->{member}"
            wanted[f"{struct}.{member}"] = f"__builtin_offsetof(struct {struct}, {member})"
            wanted[f"{struct}.{member}:size"] = f"sizeof({place})"
            if member != "h" and not member.startswith("pad") and not member.startswith("page"):
                wanted[f"{struct}.{member}:signed"] = f"((__typeof__({place}))-1 < 0)"
    for constants in c_enums().values():
        wanted.update({name: name for name in constants})
    lines = [f'\tprintf("%s\\"{name}\\": %ld", sep, (long)({value})); sep = ",";'
             for name, value in wanted.items()]  # fmt: skip
    source = '#include <stdio.h>\n#include "wire.h"\nint main(void)\n{\n\tconst char *sep = "{";\n'
    source += "\n".join(lines) + '\n\tputs("}");\n\treturn 0;\n}\n'
    folder = tmp_path_factory.mktemp("wire")
    (folder / "wire.c").write_text(source)
    cc = shutil.which("cc") or shutil.which("gcc") or "cc"
    command = [cc, "-Wall", "-Werror", f"-I{HEADER.parent}", "-o", "wire", "wire.c"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([folder / "wire"], check=True, capture_output=True, text=True)
    return json.loads(printed.stdout)


def test_both_sides_have_the_same_structures():
    assert set(c_structs()) == set(DTYPES)


@pytest.mark.parametrize("struct", DTYPES)
def test_members_are_the_same_in_the_same_order(struct):
    assert tuple(c_structs()[struct]) == DTYPES[struct].names


@pytest.mark.parametrize("struct", DTYPES)
def test_offsets_sizes_and_signs_are_the_same(struct, compiled):
    dtype = DTYPES[struct]
    fields = dtype.fields
    assert fields is not None
    assert dtype.itemsize == compiled[struct]
    for name, (member, offset, *_) in fields.items():
        assert offset == compiled[f"{struct}.{name}"], name
        assert member.itemsize == compiled[f"{struct}.{name}:size"], name
        if f"{struct}.{name}:signed" in compiled:
            assert (member.kind == "i") == bool(compiled[f"{struct}.{name}:signed"]), name
            assert member.kind in "iu", name
            assert member.byteorder in "<|=", name


def test_the_records_are_as_big_as_the_programs_say(compiled):
    assert compiled["FAULT_RECORD_SIZE"] == wire.FAULT.itemsize
    assert compiled["EVENT_RECORD_SIZE"] == wire.EVENT.itemsize


def numbered(names: tuple[str, ...], prefix: str, *, start: int = 0) -> dict[str, int]:
    """Return the C constants that a tuple of names in wire order stands for."""
    return {f"{prefix}{name.upper()}": i for i, name in enumerate(names) if i >= start}


#: enum of wire.h -> the constants that probes.wire has for it. 0 is the absence of some, and has
#: then no name in C.
ENUMS = {
    "record_kind": {**numbered(wire.KINDS, "KIND_", start=1), "KIND_MAX": len(wire.KINDS)},
    "spte_cause": numbered(wire.CAUSES, "CAUSE_"),
    "mmu_flavour": numbered(wire.MMUS, "MMU_", start=1),
    "release_call": numbered(wire.CALLS, "CALL_", start=1),
    "record_op": numbered(wire.OPS, "OP_"),
    "page_bits": {f"PAGE_{name.upper()}": bit for name, bit in wire.PAGE_BITS.items()},
}


def test_both_sides_have_the_same_enumerations():
    assert set(c_enums()) == set(ENUMS)


@pytest.mark.parametrize("enum", ENUMS)
def test_constants_have_the_same_names_and_values(enum, compiled):
    assert {name: compiled[name] for name in c_enums()[enum]} == ENUMS[enum]


def test_event_kinds_are_all_but_the_fault():
    assert set(wire.EVENT_KINDS) == set(wire.KINDS) - {"NONE", "FAULT"}


def test_a_ring_slot_is_its_header_and_the_record():
    slot = wire.ring_dtype(wire.FAULT)
    assert slot.itemsize == 8 + wire.FAULT.itemsize
    assert slot["rec"] == wire.FAULT


def test_a_record_that_the_ring_would_pad_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        wire.ring_dtype(np.dtype([("a", "<u4")]))
