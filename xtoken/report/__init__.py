"""Pages to look at: what xtoken knows about a pair of tokenizers, and how a training run went.

A page is one HTML file that needs nothing else: no network, no server. `pair` and `run` gather the facts, `page` writes
them; the templates hold the layout, the style and the little that happens in the browser.
"""

from .pair import PairReport, pair_report
from .run import RunReport, run_report

__all__ = ["PairReport", "RunReport", "pair_report", "run_report"]
