#!/usr/bin/env python3
"""Runs inside the lab: makes recordings one after another and leaves all evidence in /out.

    scenario.py NAME        one of SCENARIOS; status 75 at once if this boot's clock runs wrong

Each step leaves /out/<step>.json (status, stdout, stderr, seconds) and whatever it wrote. The
tests on the host read that; nothing is judged here.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

OUT = Path("/out")
EVENTS = Path("/sys/kernel/tracing/events")
#: An independent witness: ftrace's own counting, with no program of ours.
WITNESS = {
    "faults": ("kvm/kvm_page_fault", "hist:keys=vcpu_id"),
    "tdp_installs": ("kvmmmu/kvm_tdp_mmu_spte_changed", "hist:keys=level if new_spte & 0x800"),
    "shadow_installs": ("kvmmmu/kvm_mmu_set_spte", "hist:keys=level if spte & 0x800"),
}
SIMULATED = (
    ("--kernel", "6.12", "--scenario", "balloon", "--mem", "1M", "--seed", "11"),
    ("--kernel", "v9", "--scenario", "nested", "--mem", "1M", "--mmu", "shadow", "--seed", "12",
     "--bug", "missing_put_shadow"),
    ("--kernel", "6.13", "--scenario", "storm", "--mem", "1M", "--vcpus", "3", "--seed", "13",
     "--hostile", "loss", "--hostile", "skew"),
)  # fmt: skip
DEMAND = ["demand_paging_test", "-v", "1", "-b", "64M"]


def step(name: str, argv: list[str], **more: object) -> dict:
    """Run a command and keep what it said; it has as long as the host gives the whole boot."""
    began = time.monotonic()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return keep(name, done.returncode, done.stdout, done.stderr, began, **more)


def keep(name: str, status: int, stdout: str, stderr: str, began: float, **more: object) -> dict:
    result = {
        "status": status,
        "stdout": stdout,
        "stderr": stderr,
        "seconds": time.monotonic() - began,
        **more,
    }
    (OUT / f"{name}.json").write_text(json.dumps(result))
    print(f"{name}: status {status}, {result['seconds']:.1f} s", flush=True)
    return result


def record(name: str, *command: str, options: tuple[str, ...] = ()) -> dict:
    return whole(name, lambda: _record(name, *command, options=options))


def whole(name: str, recording: Callable[[], dict]) -> dict:
    """Record, and anew if an interrupt made the kernel skip a program, as the recorder says."""
    for _ in range(2):
        result = recording()
        if "the kernel skipped programs" not in result["stderr"]:
            return result
        for left in OUT.glob(f"{name}.*"):  # statistics too, which a second run would add to
            left.unlink()
    return recording()


def _record(name: str, *command: str, options: tuple[str, ...] = ()) -> dict:
    argv = ["pfntrace", "record", "-o", str(OUT / f"{name}.pfnt"), *options]
    return step(name, argv + (["--", *command] if command else []))


def witnessed(name: str, *command: str, options: tuple[str, ...] = ()) -> dict:
    """Record with KVM's own statistics and ftrace's counts taken in the same run."""
    return whole(name, lambda: _witnessed(name, *command, options=options))


def _witnessed(name: str, *command: str, options: tuple[str, ...] = ()) -> dict:
    for event, trigger in WITNESS.values():
        (EVENTS / event / "trigger").write_text(trigger)
    result = _record(name, "kvm-stats", str(OUT / f"{name}.stats"), *command, options=options)
    counts = {what: (EVENTS / event / "hist").read_text() for what, (event, _) in WITNESS.items()}
    for event, trigger in WITNESS.values():
        (EVENTS / event / "trigger").write_text("!" + trigger)
    (OUT / f"{name}.witness").write_text(json.dumps(counts))
    return result


def traces_left() -> dict:
    """What a recording could leave in the kernel."""
    programs = subprocess.run(["bpftool", "-j", "prog"], capture_output=True, text=True).stdout
    maps = subprocess.run(["bpftool", "-j", "map"], capture_output=True, text=True).stdout
    return {
        "programs": sorted(p.get("name", "") for p in json.loads(programs)),
        "maps": sorted(m.get("name", "") for m in json.loads(maps)),
        "kprobes": sorted(Path("/sys/kernel/debug/kprobes/list").read_text().splitlines()),
        "kprobe_events": Path("/sys/kernel/tracing/kprobe_events").read_text(),
    }


def settled(before: dict) -> dict:
    """The kernel frees programs a moment after their process: look for up to five seconds."""
    for _ in range(50):
        after = traces_left()
        if after == before:
            break
        time.sleep(0.1)
    return after


# -- scenarios --------------------------------------------------------------------------------


def basic() -> None:
    """The workloads of the issue, each recorded with two witnesses."""
    step("doctor", ["pfntrace", "doctor", "--json"])
    before = traces_left()
    witnessed("demand1", *DEMAND, options=("--fail-on-loss",))
    witnessed("demand2", "demand_paging_test", "-v", "2", "-b", "64M", options=("--fail-on-loss",))
    record("slots", "memslot_modification_stress_test", "-v", "1", "-b", "16M", "-i", "20")
    record("dirty", "dirty_log_perf_test", "-v", "1", "-b", "16M", "-i", "2")
    record("nested", "svm_vmcall_test")
    record("aging", "reclaim", "64", "prime-guest", "--pages", "4001", "--linger", "1")
    (OUT / "left.json").write_text(json.dumps({"before": before, "after": settled(before)}))


def large() -> None:
    """Large pages: mapped, split by dirty logging, put together again; and two address spaces."""
    Path("/proc/sys/vm/nr_hugepages").write_text("100")
    witnessed("large1", *DEMAND, "-s", "anonymous_hugetlb_2mb", options=("--fail-on-loss",))
    # (of its storm 7.3 skips some each time: to make it anew would not help)
    _witnessed("split", "dirty_log_page_splitting_test", "-b", "64M",
               options=("--buffer-size", "256", "--fail-on-loss"))  # fmt: skip
    record("smm", "smm_test")


def ttm() -> None:
    """A real TTM driver's evicted buffer as guest memory: boot with --device qxl."""
    record("ttm", "ttm-guest")


def attach() -> None:
    """The same guest under each way to attach, and the options that filter."""
    for how in ("kprobe", "fentry"):
        record(f"attach_{how}", "prime-guest", options=("--attach", how))
    record("gfn", "prime-guest", options=("--gfn", "0x100-0x10a"))
    record("stacks", "prime-guest", options=("--stacks",))
    record("two_vms", "prime-guest", "--vms", "2")
    record("zero_page", "prime-guest", "--read", "--pages", "101")
    # More vCPUs asleep in faults than there are kretprobe instances.
    record("asleep", "kvm-stats", str(OUT / "asleep.stats"), "demand_paging_test",
           "-v", "24", "-b", "256K", "-u", "MISSING", "-d", "3000")  # fmt: skip
    flood = ("prime-guest", "--pages", "4001", "--repeat", "3")
    record("loss", *flood, options=("--buffer-size", "0.02", "--fail-on-loss"))


def ends() -> None:
    """Every way a recording can end or be refused, on one kernel."""
    record("not_found", "no-such-command-anywhere")
    record("fails", "sh", "-c", "exit 7")
    step("unwritable", ["pfntrace", "record", "-o", "/sys/x.pfnt", "--", "true"])
    (OUT / "taken.pfnt").write_text("mine")
    record("taken", "true")
    record("duration", options=("--duration", "1"))
    record("max_size", "prime-guest", "--pages", "4001", "--repeat", "20",
           options=("--max-size", "0.3"))  # fmt: skip
    disk_full()
    interrupted()
    vm_ends()
    vm_later()
    module_reload()
    step("no_caps", ["setpriv", "--reuid", "65534", "--clear-groups", "--bounding-set=-all",
                     "pfntrace", "record", "-o", "/tmp/nobody.pfnt", "--", "true"])  # fmt: skip
    step("no_caps_doctor", ["setpriv", "--reuid", "65534", "--clear-groups",
                            "--bounding-set=-all", "pfntrace", "doctor", "--json"])  # fmt: skip


def disk_full() -> None:
    small = Path("/mnt/small")
    small.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(small)], check=True)
    step("disk_full", ["pfntrace", "record", "-o", str(small / "t.pfnt"), "--",
                       "prime-guest", "--pages", "4001", "--repeat", "10"])  # fmt: skip
    (OUT / "disk_full.pfnt").write_bytes((small / "t.pfnt").read_bytes())


def _background(name: str, *options: str) -> tuple[subprocess.Popen[str], float]:
    """Start a recorder and wait until it is armed."""
    began = time.monotonic()
    errors = (OUT / f"{name}.stderr").open("w+")
    process = subprocess.Popen(
        ["pfntrace", "record", "-o", str(OUT / f"{name}.pfnt"), *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, text=True,
    )  # fmt: skip
    while "armed after" not in (OUT / f"{name}.stderr").read_text() and process.poll() is None:
        time.sleep(0.05)
    return process, began


def _ended(name: str, process: subprocess.Popen[str], began: float) -> None:
    status = process.wait()
    keep(name, status, "", (OUT / f"{name}.stderr").read_text(), began)


def interrupted() -> None:
    process, began = _background("interrupted")
    subprocess.run(["prime-guest"], capture_output=True)
    process.send_signal(signal.SIGINT)
    _ended("interrupted", process, began)


def vm_ends() -> None:
    """The VM runs already, and its end is the recording's."""
    guest = subprocess.Popen(
        ["prime-guest", "--delay", "10", "--linger", "1"], stdout=subprocess.DEVNULL
    )
    time.sleep(1)  # the VM is there, and has not run yet
    guest.send_signal(signal.SIGSTOP)
    process, began = _background("vm_ends", "--vm", str(guest.pid))
    guest.send_signal(signal.SIGCONT)
    guest.wait()
    _ended("vm_ends", process, began)


def vm_later() -> None:
    process, began = _background("vm_later", "--duration", "4")
    time.sleep(1)
    subprocess.run(["prime-guest"], capture_output=True)
    _ended("vm_later", process, began)


def module_reload() -> None:
    """kvm_amd goes and comes under a recording; kvm itself is held by the probes or comes anew."""
    process, began = _background("module", "--duration", "8")
    subprocess.run(["rmmod", "kvm_amd"], check=False)
    gone = subprocess.run(["rmmod", "kvm"], capture_output=True, text=True)
    (OUT / "module_rmmod.json").write_text(
        json.dumps({"status": gone.returncode, "stderr": gone.stderr})
    )
    subprocess.run(["modprobe", "kvm_amd"], check=True)
    subprocess.run(["prime-guest"], capture_output=True)
    _ended("module", process, began)
    subprocess.run(["rmmod", "kvm_amd", "kvm"], check=False)
    step("no_kvm", ["pfntrace", "record", "-o", str(OUT / "no_kvm.pfnt"), "--", "true"])
    step("no_kvm_doctor", ["pfntrace", "doctor", "--json"])
    subprocess.run(["modprobe", "kvm_amd"], check=True)
    record("reloaded", "prime-guest")


def killed() -> None:
    """SIGKILL at moments spread over the life of a recorder, start-up included."""
    before = traces_left()
    runs = []
    for n in range(12):
        name = f"killed{n}"
        flood = ("--", "prime-guest", "--pages", "4001", "--repeat", "500")
        if n < 2:  # while it compiles and attaches
            process = subprocess.Popen(
                ["pfntrace", "record", "-o", str(OUT / f"{name}.pfnt"), *flood],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            time.sleep(4 + 5 * n)
            armed = time.monotonic_ns()
        else:
            process, _ = _background(name, *flood)
            armed = time.monotonic_ns()
            time.sleep(0.1 + 0.37 * n)
        at = time.monotonic_ns()
        process.kill()
        process.wait()
        subprocess.run(["pkill", "-KILL", "prime-guest"], check=False)
        runs.append({"name": name, "armed_ns": armed, "killed_ns": at})
        print(f"{name}: killed", flush=True)
    result = {"runs": runs, "before": before, "after": settled(before)}
    (OUT / "killed.json").write_text(json.dumps(result))


def confidential() -> None:
    """A host whose kernel may not be read: boot with lockdown=confidentiality."""
    step("locked", ["pfntrace", "record", "-o", str(OUT / "locked.pfnt"), "--", "true"])
    step("locked_doctor", ["pfntrace", "doctor", "--json"])
    simulated()


def simulated() -> None:
    """Simulations need no kernel: the host makes the same with its own Python, and compares."""
    for at, knobs in enumerate(SIMULATED):
        step(f"simulated{at}", ["pfntrace", "simulate", "-o", str(OUT / f"simulated{at}.pfnt"),
                                *knobs], python=sys.version_info[:2])  # fmt: skip


SCENARIOS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (basic, large, ttm, attach, ends, killed, confidential)
}


def clock_is_wrong() -> bool:
    """Does the kernel's clock run otherwise than the machine's, which keeps the host's time?

    Once one told of 300 s where 85 had gone by. It was not seen why; a kernel measures its TSC
    while it boots, and a busy host may disturb that.
    """
    ticks = Path("/sys/class/rtc/rtc0/since_epoch")

    def next_second() -> float:
        was = ticks.read_text()
        while ticks.read_text() == was:
            time.sleep(0.01)
        return time.monotonic()

    began = next_second()
    for _ in range(3):
        ended = next_second()
    return abs(ended - began - 3) > 0.6


if __name__ == "__main__":
    os.chdir(OUT)
    if clock_is_wrong():
        sys.exit(os.EX_TEMPFAIL)
    SCENARIOS[sys.argv[1]]()
