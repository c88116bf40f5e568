"""Observations turned into metrics and log lines. Knows no engine: each part is a function over plain facts."""
