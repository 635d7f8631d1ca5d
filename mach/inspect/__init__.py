"""What became of a run: its groups' logs as text for a terminal, and as a figure."""
