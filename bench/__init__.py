"""The benchmark: ``python -m bench`` from the repository root runs all rows and writes table, JSON and plot.

``--device cuda`` runs those that a GPU can, on the current one.

``rows.py`` is the table of what is measured, ``layers.py`` that of whole layers, ``machine.py`` what the machine is and
can do, and its clock, ``gpu.py`` the same of a GPU, ``measure.py`` the contenders and the checks of one row, ``report.py``
the Markdown, JSON and picture. That the kernels are right is for the tests to show; here a contender that disagrees with
ours is an error, and a missed floor is only a mark in the table.
"""
