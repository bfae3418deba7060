"""The benchmark: ``python -m bench`` from the repository root measures all rows and writes table, JSON and plot.

``--device cuda`` measures the rows that a GPU can compute, on the current one.

``rows.py`` is the table of sums to measure, ``layers.py`` that of whole layers, ``scores.py`` that of all pairs, losses
and search; ``measure.py`` has the contenders and the checks of a row. ``machine.py`` has the processor's description,
limits, clock and memory, ``gpu.py`` a GPU's; neither knows a row. ``report.py`` writes the Markdown, JSON and picture.
``ranks.py`` (``--ranks``) has losses over several processes, ``scale.py`` formulas for more of them than can be run.
``python -m bench.memory_map`` is a search of keys larger than the memory that it may take. The tests show that the kernels
are right; here a contender that disagrees with ours is an error, and a missed floor is only a mark in the table.
"""
