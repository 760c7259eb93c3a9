"""The numbers that papers print, as data: to put beside one's own, and to check against each other.

    from vlmzip.lab.papers import MeasuredScore, against, show

    mine = [MeasuredScore("llava-hf/llava-1.5-7b-hf", "visionzip", "GQA", 55.0, tokens=64)]
    print(show(against("visionzip", mine)))

One CSV file for each table lies in this folder; `Published` says what its columns mean.
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
