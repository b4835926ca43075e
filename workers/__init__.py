"""Speaks to exchanges: takes requests off the bus, signs, calls, replies."""
