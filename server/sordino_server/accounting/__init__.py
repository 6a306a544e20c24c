"""What a job's noise gives in (ε, δ), and what noise a target takes.

- `accountant`: ε of `Mechanism`s by Google's `dp-accounting` (PLD, RDP) and by the moments accountant;
- `calibrate`: the least noise for a target, beside what is spent already;
- `privacy_plan`: a job's mechanisms, before anything runs;
- `privacy_words`: the plan for people: a paragraph, and against whom it holds;
- `privacy_show`: the plan on the screen, as JSON, and as a page.

`dp-accounting` brings SciPy and is imported when a figure is asked for, not with this package.
"""
