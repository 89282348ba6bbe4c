"""Measures a model on COCO-format folders: the tables of the README, each one command.

Command line: ``python -m sam_ext.evaluate prompts --data DIR --split test --model tiny``, and the
same with ``resolution`` and ``adaptation``; ``all --data DIR --out DIR`` measures every table of
the README. Every table's JSON is a list of objects, one a row, keyed by column.

What ``--rows`` names keeps rows as they are measured, with date, commit and machine. What is there
is not measured again, as long as model, set and settings are the same; of changes in the code it
knows nothing.
"""
