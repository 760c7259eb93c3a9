"""Measure what a model loses and gains by compression. The lab imports the library; the library never imports the lab.

Along the path of the data: `tasks` defines questions and metrics. `configurations` sets methods to budgets. `study`
asks the questions and shares them among `processes`. `answers` stores what was answered in files of `records`, so that
an interrupted run can resume. `stats` and `results` summarise the records. `curves`, `examples` and `report` show the
results, and `table` lays out tables for the terminal, CSV and JSON.

Next to this path: `asking` answers one question and counts its cost, for `vlmzip ask` and `vlmzip show`. `compare`
answers one question with several methods. `tune` searches for the cheapest method. `bench` measures speed and memory.
`analyses` repeats the studies of the papers, and `analysis_answers` stores their answers. `lmms` runs lmms-eval.
`papers` has published numbers as data.

In all of these, the plain model is the uncompressed model, with which methods are compared.
"""
