"""What the interpreter, gevent and Polars are, and how they are told apart: internals."""
