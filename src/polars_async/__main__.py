"""``python -m polars_async``, where the console script is not on the path."""

import sys

from polars_async.cli import main

if __name__ == "__main__":
    sys.exit(main())
