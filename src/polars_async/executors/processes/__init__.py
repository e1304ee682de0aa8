"""Queries in worker processes: a pool, its workers, and what goes to and fro."""
