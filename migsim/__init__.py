"""migsim: KVM's TDP MMU, its dirty log and QEMU's pre-copy, exact to the page.

`migsim.load(path)` reads a scenario, `migsim.run(scenario)` migrates its guest and returns a `Result`. Names are
resolved on first use, so that `import migsim` (and `migsim --help`) pays for neither numpy nor numba.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from migsim import kernel_cache

if TYPE_CHECKING:
    from migsim.result import Result as Result
    from migsim.scenario import Scenario as Scenario
    from migsim.scenario import ScenarioError as ScenarioError
    from migsim.scenario import load as load
    from migsim.simulation import calc_dirty_rate as calc_dirty_rate
    from migsim.simulation import run as run

__all__ = ["Result", "Scenario", "ScenarioError", "__version__", "calc_dirty_rate", "load", "run"]

__version__ = "0.1.0"

_HOME = {
    "Result": "migsim.result",
    "Scenario": "migsim.scenario",
    "ScenarioError": "migsim.scenario",
    "load": "migsim.scenario",
    "calc_dirty_rate": "migsim.simulation",
    "run": "migsim.simulation",
}


kernel_cache.provide()


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'migsim' has no attribute {name!r}")
    return getattr(import_module(home), name)
