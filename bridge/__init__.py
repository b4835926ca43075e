"""Speaks to hosts: HTTP in, one request on the bus, one answer out."""
