"""The paper exchange: a real HTTP exchange for play money, and the venue that speaks to it."""
