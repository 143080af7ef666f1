"""Measure everything and write docs/results/performance.md: products, networks, training, decoding, peers, roofline.

    python benchmarks/performance.py [--quick] [--out docs/results] [--threads 1,4] [--peers openwork,eager] [--rewrite]

A run that is stopped goes on with the same command; `--rewrite` writes the page again without measuring. The same as
`openwork bench page`.
"""

from __future__ import annotations

import sys

from openwork.cli import main

if __name__ == "__main__":
    sys.argv = ["openwork", "bench", "page", *sys.argv[1:]]
    main()
