"""Slow, literal transcriptions of published equations; loops allowed; imported by tests only."""
