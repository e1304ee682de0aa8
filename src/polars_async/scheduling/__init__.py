"""Which query runs, and when: the queue, the slots, and the threads behind them."""
