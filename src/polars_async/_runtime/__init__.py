"""Internals of the interpreter, of gevent and of Polars, on which the other rooms build."""
