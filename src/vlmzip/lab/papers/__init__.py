"""Numbers that papers print, as data, to compare with your own measurements and with each other.

    from vlmzip.lab.papers import MeasuredScore, against, show

    mine = [MeasuredScore("llava-hf/llava-1.5-7b-hf", "visionzip", "GQA", 55.0, tokens=64)]
    print(show(against("visionzip", mine)))

Each table is one CSV file in this folder. `Published` documents the columns.
"""

from vlmzip.lab.papers.against import MeasuredScore, PaperComparison, against, show
from vlmzip.lab.papers.averages import Average, averages
from vlmzip.lab.papers.published import CERTAINTIES, Published, papers, published

__all__ = [
    "CERTAINTIES",
    "Average",
    "MeasuredScore",
    "PaperComparison",
    "Published",
    "against",
    "averages",
    "papers",
    "published",
    "show",
]
