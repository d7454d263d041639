"""The report of a parity check, for people: one page of HTML that needs nothing else."""
