"""Looks inside: what tests know of collectors, handles and streams beyond what these tell."""

from __future__ import annotations

# Of queries on the CPU


def running(collector):
    """Return how many queries run, those included that were let go."""
    return collector._cpu.admission.running


def waiting(collector):
    return collector._cpu.admission.waiting


def threads_in_use(collector):
    """Return how many threads its queries take, those included that are held up."""
    return collector._cpu.admission.threads


def all_threads(collector):
    """Return how many threads there are, with those that only look at a plan."""
    return collector._cpu._threads.threads


def closers(collector):
    """Return who waits for the collector to be empty."""
    return collector._cpu.admission.waiters


# Of one query


def waiters(handle):
    return handle._query._waiters


def place(handle):
    """Return where a query runs, if that is not a thread of this process."""
    return handle._query.place


def may_be_stopped(handle):
    """Return whether something is known that stops the query, or tries to."""
    return handle._query._stop is not None


def let_time_be_up(handle):
    """Have a query that has a time-out be late now, whatever the clock says."""
    handle._query.expire()


def lying_ready(buffer):
    """Return the batches of a stream that its consumer has not taken yet."""
    return buffer._arrivals.items


# Of memory


def lacks_memory(collector):
    """Return whether the last look found a query that nothing but memory held up."""
    with collector._cpu.admission.lock:  # a look first takes back what the last one has found
        return collector._cpu.admission.lacks_memory
