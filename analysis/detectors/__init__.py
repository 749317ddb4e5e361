"""The detectors of `pfntrace check`, one module each or one for a close family.

A detector is a class as `analysis.detector.Detector` describes; an object of it answers for one
trace. To add one, write its module and name it in `DETECTORS`. May import: `analysis.detectors`.
"""

from typing import Any

from analysis.detectors.balance import Balance
from analysis.detectors.books import Unpaired
from analysis.detectors.flags import RefcountedFlag
from analysis.detectors.freed import FreedWhileMapped
from analysis.detectors.growth import Growth
from analysis.detectors.installs import GfnOutside, InstallWithoutFaultIn
from analysis.detectors.invalidated import AliveAfterInvalidation
from analysis.detectors.livelock import Livelock
from analysis.detectors.marks import DeadMark
from analysis.detectors.pins import Pins
from analysis.detectors.refused import Refused
from analysis.detectors.stale import StaleInstall
from analysis.detectors.staleslot import StaleSlot
from analysis.detectors.twoleaves import LeafReplaced, TwoLeaves
from analysis.detectors.writable import WritableOverReadOnly
from analysis.detectors.wrongfolio import WrongFolio

__all__ = ("DETECTORS",)

#: In the order in which they are listed and asked.
DETECTORS: tuple[Any, ...] = (
    FreedWhileMapped,
    AliveAfterInvalidation,
    StaleSlot,
    InstallWithoutFaultIn,
    GfnOutside,
    TwoLeaves,
    LeafReplaced,
    Unpaired,
    WritableOverReadOnly,
    Balance,
    WrongFolio,
    Growth,
    DeadMark,
    RefcountedFlag,
    StaleInstall,
    Livelock,
    Pins,
    Refused,
)
