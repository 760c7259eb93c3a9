"""Measure what a model loses and gains by compression. The lab imports the library; the library never imports the lab.

Along the path of the data: `tasks` defines questions and metrics; `configurations` sets methods to budgets; `study`
asks the questions, shares them among `processes` and keeps `records`; `stats` and `results` sum up; `curves`,
`examples` and `report` show. `tune` searches for the cheapest method, `bench` times, `analyses` are the studies of the
papers, `lmms` runs lmms-eval, and `papers` has published numbers as data.
"""
