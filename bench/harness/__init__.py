"""How a number is made: time it (`timing`), beside the limits of the same machine (`roofline`, `nvml`), after a check
of its result (`check`), into a report (`report`, `table`, `plot`). `run.py` puts these together."""
