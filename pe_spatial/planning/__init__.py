"""What a training takes, before it runs: a ledger of memory and operations, the planner, searches and their report."""
