"""Type information of the running kernel, through libbpf's own BTF reader.

`Btf` answers three questions: where a member lies, what a function's parameters are called, what
an enumeration constant is worth. libbpf (a dependency of every bcc package) parses; this module
only walks its structures over ctypes. May import: standard library, `probes`.
"""

import ctypes
import ctypes.util
from collections.abc import Iterable, Iterator

from probes.errors import HostError
from probes.facts import Field

__all__ = ("Btf",)

# enum of kinds, include/uapi/linux/btf.h
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF = 1, 2, 3, 4, 5, 6, 7, 8
_VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO = 9, 10, 11, 12, 13


class _Type(ctypes.Structure):
    _fields_ = [("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32)]

    @property
    def kind(self) -> int:
        return int(self.info >> 24) & 0x1F

    @property
    def vlen(self) -> int:
        return int(self.info) & 0xFFFF

    @property
    def kflag(self) -> bool:
        return bool(self.info >> 31)


class _Member(ctypes.Structure):
    _fields_ = [
        ("name_off", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    ]


class _Pair(ctypes.Structure):
    """struct btf_enum (name, value) and struct btf_param (name, type)."""

    _fields_ = [("name_off", ctypes.c_uint32), ("value", ctypes.c_int32)]


def _libbpf() -> ctypes.CDLL:
    for name in ("libbpf.so.1", "libbpf.so.0", ctypes.util.find_library("bpf") or ""):
        try:
            lib = ctypes.CDLL(name, use_errno=True) if name else None
        except OSError:
            continue
        if lib is None:
            continue
        for fn in ("btf__load_vmlinux_btf", "btf__load_module_btf", "btf__type_by_id"):
            getattr(lib, fn).restype = ctypes.c_void_p
        lib.btf__name_by_offset.restype = ctypes.c_char_p
        lib.btf__type_cnt.restype = ctypes.c_uint32
        return lib
    raise HostError("libbpf is not installed: apt install libbpf1 (python3-bpfcc brings it)")


class Btf:
    """BTF of vmlinux, or of one module on top of it. Freed with `close()`."""

    def __init__(self, module: str = "", base: "Btf | None" = None) -> None:
        """Load from /sys/kernel/btf; raises HostError if the kernel offers none."""
        self._lib = _libbpf()
        self._base = base
        if module:
            assert base is not None, "split BTF needs its base"
            raw = self._lib.btf__load_module_btf(module.encode(), ctypes.c_void_p(base.handle))
        else:
            raw = self._lib.btf__load_vmlinux_btf()
        # libbpf 0.x returns an encoded -errno where 1.x returns NULL.
        if not raw or raw > 2**64 - 4096:
            raise HostError(f"no BTF of {module or 'vmlinux'} in /sys/kernel/btf")
        self.handle: int = raw
        self._first = base.count if base else 1
        self.count: int = self._lib.btf__type_cnt(ctypes.c_void_p(raw))
        self._own: dict[tuple[int, str], int] | None = None

    def close(self) -> None:
        """Give the memory back to libbpf."""
        if self.handle:
            self._lib.btf__free(ctypes.c_void_p(self.handle))
            self.handle = 0

    def _type(self, type_id: int) -> tuple[_Type, int]:
        address = self._lib.btf__type_by_id(ctypes.c_void_p(self.handle), type_id)
        return _Type.from_address(address), address + ctypes.sizeof(_Type)

    def _name(self, offset: int) -> str:
        if not offset:
            return ""
        name: bytes = self._lib.btf__name_by_offset(ctypes.c_void_p(self.handle), offset)
        return name.decode(errors="replace")

    def _find(self, name: str, *kinds: int) -> int:
        """Return the id of a type, 0 if there is none; a module's own types come first."""
        if self._base is not None:
            own = self._own_types()
            for kind in kinds:
                if (kind, name) in own:
                    return own[kind, name]
            return self._base._find(name, *kinds)
        for kind in kinds:
            found: int = self._lib.btf__find_by_name_kind(
                ctypes.c_void_p(self.handle), name.encode(), kind
            )
            if found > 0:
                return found
        return 0

    def _own_types(self) -> dict[tuple[int, str], int]:
        # A module has a few thousand types of its own: one walk is cheaper than any search.
        if self._own is None:
            self._own = {}
            for type_id in range(self._first, self.count):
                typ, _ = self._type(type_id)
                if typ.name_off:
                    self._own.setdefault((typ.kind, self._name(typ.name_off)), type_id)
        return self._own

    def _resolve(self, type_id: int) -> int:
        """Skip typedefs and qualifiers."""
        while type_id:
            typ, _ = self._type(type_id)
            if typ.kind not in (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT):
                break
            type_id = typ.size
        return type_id

    def _width(self, type_id: int) -> int:
        typ, _ = self._type(self._resolve(type_id))
        if typ.kind in (_INT, _STRUCT, _UNION, _ENUM):
            return int(typ.size) * 8
        return 64 if typ.kind == _PTR else 0

    def _members(self, type_id: int, base_bit: int = 0) -> Iterator[tuple[str, Field]]:
        typ, at = self._type(type_id)
        for i in range(typ.vlen):
            m = _Member.from_address(at + i * ctypes.sizeof(_Member))
            bit = base_bit + (m.offset & 0xFFFFFF if typ.kflag else m.offset)
            name = self._name(m.name_off)
            if name:
                width = m.offset >> 24 if typ.kflag else 0
                yield name, Field(bit, width or self._width(m.type))
            else:
                inner = self._resolve(m.type)
                if self._type(inner)[0].kind in (_STRUCT, _UNION):
                    yield from self._members(inner, bit)

    def struct(self, name: str, wanted: Iterable[str]) -> dict[str, Field]:
        """Return the places of the wanted members that exist, `""` being the whole.

        Members of anonymous inner structures count as the structure's own. Empty if BTF does not
        know the structure.
        """
        type_id = self._find(name, _STRUCT, _UNION)
        if not type_id:
            return {}
        wanted = set(wanted)
        places = {member: place for member, place in self._members(type_id) if member in wanted}
        return {"": Field(0, self._type(type_id)[0].size * 8), **places}

    def parameters(self, function: str) -> tuple[str, ...] | None:
        """Return a function's parameter names, None if BTF does not know it."""
        func = self._find(function, _FUNC)
        if not func:
            return None
        proto, at = self._type(self._type(func)[0].size)
        pairs = (_Pair.from_address(at + i * ctypes.sizeof(_Pair)) for i in range(proto.vlen))
        return tuple(self._name(p.name_off) for p in pairs)

    def own_parameters(self, function: str) -> tuple[str, ...] | None:
        """As `parameters`, but only for functions of this very module."""
        return self.parameters(function) if (_FUNC, function) in self._own_types() else None

    def has_typedef(self, name: str) -> bool:
        """Tell whether BTF knows this typedef."""
        return bool(self._find(name, _TYPEDEF))

    def enum(self, name: str) -> dict[str, int]:
        """Return the constants of a named enumeration; empty if there is none."""
        type_id = self._find(name, _ENUM)
        return dict(self._constants(type_id)) if type_id else {}

    def anonymous_enums(self, wanted: Iterable[str]) -> dict[str, int]:
        """Return the wanted constants of this module's unnamed enumerations."""
        wanted, found = set(wanted), {}
        for type_id in range(self._first, self.count):
            typ, _ = self._type(type_id)
            if typ.kind == _ENUM and not typ.name_off:
                found.update({k: v for k, v in self._constants(type_id) if k in wanted})
        return found

    def _constants(self, type_id: int) -> Iterator[tuple[str, int]]:
        typ, at = self._type(type_id)
        for i in range(typ.vlen):
            pair = _Pair.from_address(at + i * ctypes.sizeof(_Pair))
            yield self._name(pair.name_off), pair.value
