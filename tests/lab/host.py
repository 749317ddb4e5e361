"""The host's own tools: running commands, installing what is missing, asking its apt and pip.

No mirror is named anywhere in the lab: apt and pip of the host know theirs. Debian's other suites
are reached with a private apt state in the cache folder, so the host's own lists and packages stay
as they are. Imports ``cache`` and ``errors``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cache import cache_dir, locked, progress
from .errors import LabError

__all__ = (
    "apt_sources",
    "download",
    "install_missing",
    "kernel_packages",
    "mirror",
    "pip_command",
    "run",
)

# Every Debian suite that the lab takes something from.
SUITES = ("trixie", "trixie-backports", "bookworm")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_LISTS_AGE_S_MAX = 6 * 3600


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    allowed: Sequence[int] = (0,),
) -> str:
    """Run *command* and return its stdout; a failure is a LabError with its last lines."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise LabError(f"{words[0]} is not installed: run `tests/lab/lab build`") from None
    if done.returncode not in allowed:
        said = (done.stderr or done.stdout).strip().splitlines()
        # make only repeats that something below it failed.
        telling = [line for line in said if not line.startswith("make")] or said
        tail = " / ".join(telling[-5:])
        raise LabError(f"`{shlex.join(words)[:300]}` failed ({done.returncode}): {tail}")
    return done.stdout


def install_missing(packages: Mapping[str, str]) -> None:
    """Install with apt the Debian packages of those tools that the PATH lacks.

    *packages* maps a tool, or the full path of a file, to the package that has it.
    """
    path = os.environ.get("PATH", os.defpath)
    if "/usr/sbin" not in path.split(":"):
        os.environ["PATH"] = f"{path}:/usr/sbin:/sbin"
    missing = sorted(
        {
            package
            for tool, package in packages.items()
            if not (Path(tool).exists() if tool.startswith("/") else shutil.which(tool))
        }
    )
    if not missing:
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if not shutil.which("apt-get"):
        raise LabError(f"no apt-get here: install by other means what Debian calls {missing}")
    prefix = _as_root()
    with locked("host-packages"):
        progress(f"installing on the host: {' '.join(missing)}")
        try:
            try:
                run([*prefix, *install])
            except LabError:  # most often: the lists are old, or there are none
                run([*prefix, "apt-get", "update"])
                run([*prefix, *install])
        except LabError as error:
            raise LabError(
                f"host packages are missing; run as root: apt-get update && {shlex.join(install)}"
                f" ({error})"
            ) from None


def mirror() -> str:
    """Return the address of the Debian mirror that the host's apt uses."""
    query = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]
    targets = run(query)
    if not targets:  # apt lists nothing before its first update
        run([*_as_root(), "apt-get", "update"])
        targets = run(query)
    for line in targets.splitlines():
        uri, _, release = line.partition(" ")
        if release.strip() in ("bookworm", "trixie", "forky", "sid", "stable", "testing"):
            return uri
    raise LabError("the host's apt has no Debian suite: add one to /etc/apt/sources.list.d")


def _as_root() -> list[str]:
    return [*([] if os.geteuid() == 0 else ["sudo", "-n"]), "env", "DEBIAN_FRONTEND=noninteractive"]


def apt_sources(*suites: str) -> str:
    """Return the text of a sources.list for *suites* on the host's mirror."""
    if not KEYRING.exists():
        install_missing({str(KEYRING): "debian-archive-keyring"})
    address = mirror()
    return "".join(f"deb [signed-by={KEYRING}] {address} {suite} main\n" for suite in suites)


# The options that make the host's apt work on a state of our own. Call with the lock "apt" held.
def _private_apt() -> list[str]:
    state = cache_dir() / "apt"
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    sources = state / "sources.list"
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    wanted = apt_sources(*SUITES)
    age = time.time() - sources.stat().st_mtime if sources.exists() else APT_LISTS_AGE_S_MAX
    if age >= APT_LISTS_AGE_S_MAX or sources.read_text() != wanted:
        sources.unlink(missing_ok=True)
        fresh = sources.with_suffix(".new")
        fresh.write_text(wanted)
        run(["apt-get", *words, "-o", f"Dir::Etc::sourcelist={fresh}", "update"])
        fresh.rename(sources)
    return words


def kernel_packages(package: str, suite: str) -> list[str]:
    """Return ``name=version`` of the ``linux-*`` packages behind the metapackage *package*.

    Debian has one package per kernel up to 6.12 and three (base, binary, modules) later.
    """
    with locked("apt"):
        options = _private_apt()
        found: list[str] = []
        queue = [f"{package}/{suite}"]
        while queue:
            shown = run(["apt-cache", *options, "show", "--no-all-versions", queue.pop()])
            fields = dict(re.findall(r"^(\w[\w-]*): (.*)$", shown, re.MULTILINE))
            found.append(f"{fields['Package']}={fields['Version']}")
            for dependency in fields.get("Depends", "").split(", "):
                name, _, relation = dependency.partition(" ")
                exact = relation.startswith("(= ")
                if name.startswith("linux-") and exact:
                    wanted = f"{name}={relation[3:-1]}"
                    if wanted not in found and wanted not in queue:
                        queue.append(wanted)
    return found


def download(packages: Sequence[str], into: Path) -> list[Path]:
    """Download Debian packages (``name``, ``name=version``) and return their files."""
    into.mkdir(parents=True, exist_ok=True)
    with locked("apt"):
        run(["apt-get", *_private_apt(), "download", *packages], cwd=into)
    return sorted(into.glob("*.deb"))


def pip_command() -> list[str]:
    """Return a pip of the host, installing Debian's if there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        probe = subprocess.run([python, "-m", "pip", "--version"], capture_output=True)
        if probe.returncode == 0:
            return [python, "-m", "pip"]
    install_missing({"pip3": "python3-pip"})
    return ["/usr/bin/python3", "-m", "pip"]
