"""POST-HOC: any average of a run, from those that were stored.

A stored average weights the states of its run in a known way, which is its profile p_i. The sum of
stored averages with coefficients c weights them by sum_i c_i p_i, and the coefficients can be
chosen so that this is nearly the profile of an average that nobody kept. How nearly is known before
a tensor is read. These modules know profiles and fact sheets; they may not know models, and how
tensors are read and summed is the affair of others (`checkpoint`, `combine`).
"""

from polyak.posthoc.curve import Curve, Point
from polyak.posthoc.horizon import search
from polyak.posthoc.reconstruction import reconstruct
from polyak.posthoc.solution import Average, Solution, solve
from polyak.posthoc.stored import Snapshot

__all__ = [
    "Average",
    "Curve",
    "Point",
    "Snapshot",
    "Solution",
    "reconstruct",
    "search",
    "solve",
]
