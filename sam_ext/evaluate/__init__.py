"""Measures a model on COCO-format folders: the tables of the README, each one command.

Command line: ``python -m sam_ext.evaluate prompts --data DIR --split test --model tiny``, and the
same with ``resolution``. Every table's JSON is a list of objects, one a row, keyed by column.
"""
