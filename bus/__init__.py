"""The shared language and state: what bridge and workers agree on. Imports nothing of either."""
