"""What is measured of one contender, in a process of its own."""
