"""Scripts that produce files of this repository: mini's weights, and the results that the documents cite.

Run them from the repository's root: `python -m recipes.mini.train`. They import vlmzip; vlmzip never imports them.
"""
