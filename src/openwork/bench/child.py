"""The side that measures: a process that reads one task and writes a line of JSON for everything that happens.

A peer that crashes, or ends the process as some libraries do, costs its own arm only: the parent knows which peer was
running, leaves it out and starts the rest again. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any


def main() -> int:
    """Read a task from standard input and measure its cells."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        work(json.loads(sys.stdin.read()), lines)
    return 0


def work(task: dict[str, Any], lines: IO[str]) -> None:
    """Measure the cells of a task and write to `lines`: {"at": peer}, {"limits": ...}, {"row": ...}, {"error": text}.

    The task has `kind` (operator, network or task), `cells`, `peers`, `skip` (for each cell, peers that crashed on it),
    `threads` and `seconds`.
    """
    import torch

    from openwork.bench import networks, operators, roofline, tasks
    from openwork.errors import OpenworkError

    def tell(**words: Any) -> None:
        lines.write(json.dumps(words) + "\n")
        lines.flush()

    torch.set_num_threads(task["threads"])
    limits = roofline.measure(task["threads"])
    tell(limits=None if limits is None else limits.to_json())
    held = operators.Held()
    for found, skip in zip(task["cells"], task["skip"], strict=True):
        names = [name for name in task["peers"] if name not in skip]

        def say(name: str) -> None:
            tell(at=name)

        try:
            if task["kind"] == "operator":
                cell = operators.Cell(**found)
                made = operators.measure(cell, names, limits, seconds=task["seconds"], held=held, say=say)
            elif task["kind"] == "network":
                network = networks.Network.from_json(found)
                made = networks.measure(network, names, limits, seconds=task["seconds"], say=say)
            else:
                made = tasks.measure(found["name"], names, seconds=task["seconds"], say=say)
        except OpenworkError as error:
            tell(error=str(error))
        else:
            tell(row=made.to_json())


if __name__ == "__main__":
    sys.exit(main())
