"""Queries on several engines: how long each takes, how much memory, and whether answers agree."""
