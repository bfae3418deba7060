"""The benchmark: ``python -m bench`` from the repository root measures all rows and writes table, JSON and plot.

``--device cuda`` measures the rows that a GPU can compute, on the current one.

``rows.py`` is the table of sums to measure, ``layers.py`` the table of whole layers; ``measure.py`` has the contenders and
the checks of a row. ``machine.py`` has the processor's description, limits, clock and memory, ``gpu.py`` a GPU's; neither
knows a row. ``report.py`` writes the Markdown, JSON and picture. The tests show that the kernels are right; here a
contender that disagrees with ours is an error, and a missed floor is only a mark in the table.
"""
