"""Checkpoint readers and writers. A leaf: imports nothing of ours, and is handed the tree it has to fill."""
