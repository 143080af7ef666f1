"""The reliability matrix: 36 figures that openwork is held to, each measured in a short and in a long form.

`matrix.ROWS` is the table; `openwork doctor --long` measures the long forms and writes docs/results/reliability.md.
"""
