"""Facts travel as JSON: inside a trace, and as the fixtures of these tests."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.errors import TraceFormatError
from probes.facts import FACTS_VERSION, Field, KernelFacts, series_version

FACTS = Path(__file__).parent / "facts"
FIXTURES = sorted(path.stem for path in FACTS.glob("*.json"))


def test_every_kernel_of_the_lab_has_a_fixture():
    assert {"6.1", "6.12", "7.3"} <= set(FIXTURES)


@pytest.mark.parametrize("name", FIXTURES)
def test_facts_come_back_from_json_as_they_were(name):
    facts = KernelFacts.from_json((FACTS / f"{name}.json").read_text())
    assert KernelFacts.from_json(facts.to_json()) == facts
    assert facts.release


def test_places_come_back_as_fields_and_lists_as_tuples():
    facts = KernelFacts(
        structs={"page": {"": Field(0, 512), "_refcount": Field(416, 32)}},
        functions={"f": ("kvm", "sptep")},
        symbols=("f", "f.isra.0"),
        kprobes=None,
    )
    back = KernelFacts.from_json(facts.to_json())
    assert back == facts
    assert back.structs["page"]["_refcount"].offset == 52
    assert isinstance(back.symbols, tuple) and isinstance(back.functions["f"], tuple)


def test_an_offset_is_that_of_the_first_member_that_exists():
    facts = KernelFacts(structs={"page": {"compound_info": Field(64, 64)}})
    assert facts.offset("page", "compound_head", "compound_info") == 8
    assert facts.offset("page", "compound_head") is None
    assert facts.offset("folio", "compound_head") is None
    assert facts.has_field("page", "compound_info")
    assert not facts.has_field("folio", "compound_info")


@pytest.mark.parametrize("version", [FACTS_VERSION + 1, 0, None, "1"])
def test_facts_of_another_version_are_refused(version):
    data = json.loads(KernelFacts().to_json())
    data["facts_version"] = version
    with pytest.raises(TraceFormatError, match="another version"):
        KernelFacts.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        '{"facts_version": 1}',
        '{"facts_version": 1, "structs": []}',
    ],
)
def test_what_is_not_facts_is_refused(text):
    with pytest.raises(TraceFormatError):
        KernelFacts.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("structs", {"page": {"flags": [1, 2, 3]}}),
        ("structs", {"page": 7}),
        ("functions", {"f": 7}),
        ("symbols", 7),
        ("unheard_of", 7),
    ],
)
def test_facts_of_a_wrong_shape_are_refused(key, value):
    data = json.loads(KernelFacts().to_json())
    data[key] = value
    with pytest.raises(TraceFormatError, match="not the facts of a kernel"):
        KernelFacts.from_json(json.dumps(data))


@given(st.data())
def test_a_damaged_byte_gives_facts_or_a_clear_error_never_a_traceback(data):
    text = bytearray(KernelFacts(release="6.12", values={"zero_pfn": 1}).to_json().encode())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.integers(0, 255))
    try:
        KernelFacts.from_json(text.decode(errors="replace"))
    except TraceFormatError as err:
        assert "\n" not in str(err)


@pytest.mark.parametrize(
    ("members", "values", "version"),
    [
        ({"kvm_follow_pfn": ("allow_write_mapping",)}, {}, "v7"),
        ({"kvm_follow_pfn": ("try_map_writable",)}, {}, "v8"),
        ({"kvm_follow_pfn": ("try_map_writable", "allow_non_refcounted_struct_page")}, {}, "v9"),
        ({"kvm_page_fault": ("accessed_page",)}, {}, "v10"),
        ({"kvm_page_fault": ("accessed_page",)}, {"shadow_refcounted_mask": 0}, "v11"),
        ({"kvm_page_fault": ("is_refcounted_page",)}, {}, ""),
        ({}, {}, ""),
    ],
)
def test_each_version_of_the_series_is_known_by_what_it_left_in_structures(
    members, values, version
):
    structs = {name: dict.fromkeys(those, Field(0, 64)) for name, those in members.items()}
    assert series_version(KernelFacts(structs=structs, values=values)) == version
