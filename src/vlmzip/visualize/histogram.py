"""A histogram of the images' deviations around the calibrated threshold."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlmzip.visualize.figure import as_image, new_figure

BINS = 30


def draw_deviations(deviations: Sequence[dict[int, float]], threshold: float, title: str) -> Image.Image:
    """Draw one histogram outline per factor. Images to the left of the threshold line can be pooled by that factor."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    factors = sorted({factor for by_factor in deviations for factor in by_factor})
    values = {factor: [by_factor[factor] for by_factor in deviations if factor in by_factor] for factor in factors}
    most = max([threshold, *(max(series) for series in values.values())], default=threshold)
    for factor, series in values.items():
        axes.hist(series, bins=BINS, range=(0, 1.05 * most), histtype="step", linewidth=1.5, label=f"factor {factor}")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.4g}")
    axes.set(xlabel="deviation inside windows", ylabel="images", title=f"{title}: {len(deviations)} images")
    figure.tick_whole_numbers(axes.yaxis)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return as_image(figure)
