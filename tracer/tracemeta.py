"""What a trace says about its own making: written once, in the schema's metadata.

May import: `probes.errors`, `tracer.schema`, standard library.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

from probes.errors import TraceFormatError
from tracer.schema import SCHEMA_VERSION

__all__ = ("CRC_KEY", "HEAD_BYTES_MAX", "META_KEY", "TraceMeta", "parse_json")

#: Longest schema message of a trace. The facts of a kernel, its largest part, are 8 KiB.
HEAD_BYTES_MAX = 4 << 20

#: Keys of the Arrow schema's metadata.
META_KEY = "pfntrace"
CRC_KEY = "pfntrace.crc"

#: The kernel's times are signed 64-bit numbers of ns (ktime_t).
_TIME_END = 1 << 63

#: Deepest nesting of JSON in a trace; what is within it can be written out again.
_DEPTH_MAX = 64


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text from a trace; raises ValueError if it is none, or too deep.

    NaN and infinities, which are no JSON, come back as text.
    """
    try:
        value = json.loads(text, parse_constant=str)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    level: list[Any] = [value]
    for _ in range(_DEPTH_MAX):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return value
    raise ValueError("JSON nested too deeply")


@dataclasses.dataclass(frozen=True, slots=True)
class TraceMeta:
    """Who recorded what, where and how. Times are ns; `profile` and `settings` are plain JSON."""

    schema_version: int
    pfntrace_version: str
    #: the command line, one word each.
    command: tuple[str, ...]
    #: when the recording began: wall clock (since 1970) and CLOCK_MONOTONIC, the clock of `ts`.
    start_unix_ns: int
    start_monotonic_ns: int
    hostname: str
    #: `KernelFacts.to_json()`.
    facts: str
    #: generation, hooks, missing, failed, results (RET_PF_* value -> name) of the KernelProfile.
    profile: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def results(self) -> dict[int, str]:
        """RET_PF_* value -> name as the recorded kernel numbers them."""
        return {int(value): str(name) for value, name in self.profile.get("results", {}).items()}

    def to_metadata(self) -> dict[str, str]:
        """Return the key-value pairs for the Arrow schema: the JSON and its checksum."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        text = json.dumps(values, sort_keys=True, allow_nan=False)
        return {META_KEY: text, CRC_KEY: f"{zlib.crc32(text.encode()):08x}"}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> "TraceMeta":
        """Return what `to_metadata` wrote.

        Raises TraceFormatError (without the file's name) if it is missing, damaged, of another
        schema version or not of the expected types.
        """
        text = (metadata or {}).get(META_KEY.encode())
        if text is None:
            raise TraceFormatError("not a pfntrace trace, though an Arrow stream")
        if (metadata or {}).get(CRC_KEY.encode()) != f"{zlib.crc32(text):08x}".encode():
            raise TraceFormatError("its head is damaged; nothing of it can be trusted")
        try:
            data = parse_json(text)
            version = data["schema_version"]
        except (KeyError, TypeError, ValueError) as err:
            raise TraceFormatError("its head is not a pfntrace description") from err
        if version != SCHEMA_VERSION:
            raise TraceFormatError(
                f"trace of schema version {version!r:.20}, this pfntrace reads {SCHEMA_VERSION}; "
                "use the pfntrace that recorded it"
            )
        return cls._checked(data)

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> "TraceMeta":
        if set(data) != {f.name for f in dataclasses.fields(cls)}:
            raise TraceFormatError("its head lacks a part of the description")
        data["command"] = tuple(data["command"]) if isinstance(data["command"], list) else None
        for name, kind in _TYPES.items():
            if not isinstance(data[name], kind):
                raise TraceFormatError(f"its head is wrong: {name} is no {kind.__name__}")
        if not (-_TIME_END <= data["start_unix_ns"] < _TIME_END
                and 0 <= data["start_monotonic_ns"] < _TIME_END):  # fmt: skip
            raise TraceFormatError("its head is wrong: no time at which a recording can begin")
        meta = cls(**data)
        try:
            meta.results  # noqa: B018 - a property that must not fail later
        except (AttributeError, TypeError, ValueError) as err:
            raise TraceFormatError("its head is wrong: no names of results") from err
        return meta


_TYPES: dict[str, type] = {
    "pfntrace_version": str,
    "command": tuple,
    "start_unix_ns": int,
    "start_monotonic_ns": int,
    "hostname": str,
    "facts": str,
    "profile": dict,
    "settings": dict,
}
