"""A trial away from the process that planned it: what it takes along, and whether it is the same trial there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from openwork.errors import TrialError
from openwork.lab.spec import Trial

FOLDERS = ("OPENWORK_DATA", "OPENWORK_CACHE")
SWITCHES = ("OPENWORK_OFFLINE", "HF_HUB_OFFLINE")


def baggage() -> dict[str, Any]:
    """Return what a trial that is run in another process needs to find the same files, in plain JSON values.

    `folder` is the working folder, `paths` are the import paths outside of the Python installation, `variables` those of
    the environment that say where data are and whether anything may be downloaded.
    """
    installed = tuple(os.path.join(os.path.realpath(prefix), "") for prefix in (sys.prefix, sys.base_prefix))
    paths = [os.path.abspath(path) for path in sys.path]
    return {
        "folder": os.getcwd(),
        "paths": [path for path in paths if not os.path.realpath(path).startswith(installed)],
        "variables": {name: os.environ[name] for name in (*FOLDERS, *SWITCHES) if os.environ.get(name)},
    }


def unpacked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a `baggage` that this machine lacks and can use; its own settings win."""
    variables = {
        name: value
        for name, value in given["variables"].items()
        if not os.environ.get(name) and (name not in FOLDERS or os.path.isdir(value))
    }
    own = "CUDA_VISIBLE_DEVICES"  # given out anew with every trial
    return {**given, "variables": {**variables, **({own: os.environ[own]} if own in os.environ else {})}}


def settle(trial: Trial, given: Mapping[str, Any]) -> None:
    """Make this process like the one that planned `trial`, and make sure that the trial is the same here.

    Raises:
        TrialError: if code, versions or data differ from those in the trial's identity.
        OpenworkError: if the user's code or data are not here.
    """
    os.environ.update(given["variables"])
    if os.path.isdir(given["folder"]):
        os.chdir(given["folder"])
    sys.path += [path for path in given["paths"] if path not in sys.path and os.path.exists(path)]
    own = identity(trial)
    differing = [name for name in sorted({*own, *trial.identity}) if own.get(name) != trial.identity.get(name)]
    if differing:
        pairs = ((name, _short(own.get(name)), _short(trial.identity.get(name))) for name in differing)
        said = ", ".join(f"{name} {here} instead of {planned}" for name, here, planned in pairs)
        raise TrialError(f"it has {said}; install the same versions and put the same files on every machine")


def identity(trial: Trial) -> dict[str, Any]:
    """Return the identity that `trial` would have if it were planned here."""
    from openwork.lab import environment
    from openwork.lab.study import find

    study = find(trial.study)
    config = study.config.read(trial.config)
    made = {**environment.identity(int(trial.identity.get("threads", 1)), study), **config.identity()}
    return {**made, "processes": trial.identity["processes"]} if "processes" in trial.identity else made


def _short(value: Any) -> str:
    return str(value)[:12] if value is not None else "none"
