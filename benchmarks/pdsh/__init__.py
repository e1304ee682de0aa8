"""PDS-H: 22 queries derived from TPC-H, not comparable to published TPC-H results."""
