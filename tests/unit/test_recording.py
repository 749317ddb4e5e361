"""From a command line to a recording: names, refusals and what they leave behind (nothing)."""

import errno
import os
from pathlib import Path

import pytest
from unit.test_doctor import facts_of

from probes.errors import CommandError, HostError, OutputError, ProbeLoadError, UsageError
from tracer import recording
from tracer.recording import boot_id, check_output, default_output, process_start, record_to
from tracer.session import Outcome, RecordOptions
from tracer.tracefile import TraceReader

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

#: A process that never is.
DEAD = 2**22 + 1


class FakeRecorder:
    """Stands where tracer.session.Recorder does; notes what it was asked, fails where told."""

    calls: list[str] = []
    fail_prepare: Exception | None = None
    why = "duration"

    def __init__(self, profile, settings, options):
        self.profile, self.settings, self.options = profile, settings, options
        self.failed = [("gup", "hva_to_pfn", "refused")]

    def prepare(self):
        self.calls.append("prepare")
        if self.fail_prepare is not None:
            raise self.fail_prepare

    def run(self, writer, command, started, told, show):
        self.calls.append("run")
        told(1.5)
        if command is not None:
            command.start()
            while command.poll() is None:
                pass
        writer.close({"why": self.why})
        return Outcome(self.why, 0.0, 0, 0, 0, {}, 0.0, writer.bytes_written, 0.0, {})

    def abandon(self):
        self.calls.append("abandon")


@pytest.fixture
def recorder(monkeypatch):
    """Put a made-up recorder on an able host; return its class."""

    class Recorder(FakeRecorder):
        calls: list[str] = []

    monkeypatch.setattr(recording, "Recorder", Recorder)
    monkeypatch.setattr(recording, "observe", lambda: facts_of("6.12"))
    return Recorder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(*command: str, output: Path | None = None, overwrite: bool = False, **options):
    said: list[str] = []
    path, outcome, status = record_to(
        RecordOptions(**options),
        command,
        output=output,
        attach="auto",
        overwrite=overwrite,
        version="0.0",
        argv=("record", *command),
        say=said.append,
        show=None,
    )
    return path, outcome, status, said


def children() -> list[int]:
    return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("6.12-nobody", "not privileged"),
        ("6.12-lockdown", "locked down"),
        ("6.18-no-kprobes", "CONFIG_KPROBES"),
        ("6.12-no-kvm", "kvm is not loaded"),
    ],
)
def test_a_host_that_cannot_record_says_why_in_one_line_and_leaves_no_file(
    recorder, folder, monkeypatch, name, reason
):
    monkeypatch.setattr(recording, "observe", lambda: facts_of(name))
    mark = folder / "mark"
    with pytest.raises(HostError, match=reason) as caught:
        record("touch", str(mark))
    assert str(caught.value).startswith("cannot record on this host: ")
    assert "\n" not in str(caught.value)
    assert (list(folder.iterdir()), recorder.calls, children()) == ([], [], [])


def test_a_process_that_is_not_there_is_a_usage_error_before_anything_is_looked_at(
    folder, monkeypatch
):
    monkeypatch.setattr(recording, "observe", lambda: pytest.fail("observed"))
    with pytest.raises(UsageError, match=f"--vm {DEAD}: no such process"):
        record(pids=(os.getpid(), DEAD))
    assert list(folder.iterdir()) == []


def test_a_process_that_ends_before_its_name_is_read_is_a_usage_error(recorder, monkeypatch):
    def gone(*_args, **_named):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    monkeypatch.setattr(Path, "read_text", gone)
    monkeypatch.setattr(recording, "observe", lambda facts=facts_of: FACTS)
    monkeypatch.setattr(recording, "process_start", lambda: 0.0)
    with pytest.raises(UsageError, match="no such process"):
        record(pids=(os.getpid(),))


FACTS = facts_of("6.12")


def test_a_command_that_does_not_exist_leaves_no_file(recorder, folder):
    with pytest.raises(CommandError, match="command not found"):
        record("no-such-command-here")
    assert (list(folder.iterdir()), recorder.calls) == ([], [])


def test_a_command_that_cannot_be_executed_leaves_no_file(recorder, folder):
    broken = folder / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    with pytest.raises(CommandError, match="Exec format error; nothing was recorded"):
        record(str(broken))
    assert list(folder.iterdir()) == [broken]
    assert recorder.calls == ["prepare", "run", "abandon"]
    assert children() == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_compiled(recorder, folder):
    mark = folder / "mark"
    with pytest.raises(OutputError, match="is not a folder"):
        record("touch", str(mark), output=folder / "no" / "x.pfnt")
    assert recorder.calls == ["abandon"]
    assert (children(), mark.exists()) == ([], False)


@pytest.mark.parametrize("problem", [ProbeLoadError("refused"), KeyboardInterrupt()])
def test_what_goes_wrong_while_loading_leaves_neither_file_nor_process(recorder, folder, problem):
    recorder.fail_prepare = problem
    mark = folder / "mark"
    with pytest.raises(type(problem)):
        record("touch", str(mark))
    assert (list(folder.iterdir()), children()) == ([], [])
    assert recorder.calls == ["prepare", "abandon"]


# --- where it is written --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comm", "name"),
    [
        ("", "vm"),
        ("qemu-system-x86_64", "qemu-system-x86_64"),
        ("CPU 0/KVM", "CPU_0_KVM"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("a\nb\x1b[2J;$(rm)", "a_b__2J___rm_"),
        ("-o", "-o"),
        ("gäst", "gäst"),
    ],
)
def test_the_default_name_is_that_of_the_process_made_harmless(comm, name):
    assert default_output(comm, 7) == Path(f"pfntrace-{name}.7.pfnt")


def test_an_existing_file_is_kept_unless_force_says_otherwise(folder):
    path = folder / "x.pfnt"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"exists: choose another name with -o, .* --force$"):
        check_output(path, overwrite=False)
    check_output(path, overwrite=True)
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(folder):
    (folder / "file").write_text("")
    for path in (folder / "no" / "x.pfnt", folder / "file" / "x.pfnt"):
        with pytest.raises(OutputError, match="is not a folder: choose another place with -o"):
            check_output(path, overwrite=True)


def test_a_folder_that_must_not_be_written_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may everything
    with pytest.raises(OutputError, match="is not writable: choose another place with -o"):
        check_output(folder / "x.pfnt", overwrite=False)


def test_a_name_that_no_file_can_have_is_refused(folder):
    with pytest.raises(OutputError, match="File name too long; choose another name with -o"):
        check_output(folder / ("x" * 300), overwrite=False)


def test_a_folder_that_must_not_be_searched_is_refused(folder, monkeypatch):
    def refuse(_path, **_named):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(OutputError, match="Permission denied; choose another name with -o"):
        check_output(folder / "x.pfnt", overwrite=False)


# --- recordings -----------------------------------------------------------------------------------


def test_a_command_gives_the_trace_its_name_and_its_status(recorder, folder):
    recorder.why = "command"
    path, outcome, status, said = record("sh", "-c", "exit 3")
    assert (outcome.why, status) == ("command", 3)
    assert path.name.startswith("pfntrace-sh.") and path.suffix == ".pfnt"
    assert len(said) == 1
    assert said[0].startswith(f"pfntrace: recording to {path} (armed after ")
    assert "Ctrl-C" not in said[0]


def test_a_command_that_was_ended_by_us_has_no_status_to_hand_on(recorder):
    assert record("sh", "-c", "exit 3")[2] == 0


def test_one_process_gives_the_trace_its_name(recorder):
    comm = Path("/proc/self/comm").read_text().strip()
    path, *_, said = record(pids=(os.getpid(),))
    assert path == default_output(comm, os.getpid())
    assert said[0].endswith("; Ctrl-C ends it")


def test_a_name_that_is_not_utf8_is_no_obstacle(recorder):
    comm = Path(f"/proc/{os.getpid()}/comm")
    before = comm.read_bytes()
    comm.write_bytes(b"g\xff\xfest")
    try:
        path, *_ = record(pids=(os.getpid(),))
    finally:
        comm.write_bytes(before.strip())
    assert path == Path(f"pfntrace-g__st.{os.getpid()}.pfnt")


def test_a_trace_of_everything_is_named_after_the_host(recorder):
    assert record()[0] == Path(f"pfntrace-host.{os.getpid()}.pfnt")


def test_the_trace_says_how_it_was_made(recorder, folder):
    path = record("true", output=folder / "x.pfnt", gfns=(1, 2))[0]
    reader = TraceReader(path)
    info = reader.info()
    assert info["complete"]
    assert info["command"] == ["pfntrace", "record", "true"]
    assert (info["kernel"], info["generation"]) == (FACTS.release, "G0b")
    assert "fault" in [hook["hook"] for hook in info["hooks"]]
    assert reader.meta.profile["failed"] == [
        {"hook": "gup", "symbol": "hva_to_pfn", "why": "refused"}
    ]
    assert reader.meta.settings["gfns"] == [1, 2]
    reader.close()


def test_under_sudo_the_trace_belongs_to_who_called_it(recorder, folder, monkeypatch):
    given = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: given.append((uid, gid)))
    for uid, gid in (("1000", "100"), ("", "1"), ("root", "0")):
        monkeypatch.setenv("SUDO_UID", uid)
        monkeypatch.setenv("SUDO_GID", gid)
        record(output=folder / "x.pfnt", overwrite=True)
    assert given == [(1000, 100)]


def test_the_start_of_this_process_lies_in_the_past():
    import time

    assert 0 < time.monotonic() - process_start() < 24 * 3600


def test_a_trace_names_its_boot_if_the_kernel_does(tmp_path):
    assert boot_id(tmp_path) == ""
    file = tmp_path / "sys/kernel/random/boot_id"
    file.parent.mkdir(parents=True)
    file.write_text("0f3a-77\n")
    assert boot_id(tmp_path) == "0f3a-77"
