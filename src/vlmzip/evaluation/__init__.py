"""What a model loses and gains by compression: one record for each question, then tables, curves and a page.

Its parts, along the way of the data: `task` and `tasks` say what is asked (`mini_task`, `easy_vqa`, `folder`) and
`metrics` how answers are scored; `configurations` sets methods to budgets; `study` asks (`answering`, shared among
`processes`) and keeps `records`; `bootstrap` and `results` sum up; `curves`, `examples` and `report` show. `papers` has
published numbers as data.
"""
