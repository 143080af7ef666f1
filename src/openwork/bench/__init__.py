"""The bench: openwork's kernels beside every way to do the same that can be had, on this machine, in one run.

`peers` is the registry of the ways, `roofline` measures what the machine could do, `operators` and `networks` make the
products and the models, `child` times them in processes that may crash, `runner` drives those and keeps what is
finished, `targets` says what was promised, `plot` and `page` write it down.
"""
