"""The freshness checker: hosts that poll while things break, and whether each answer was true, and recently enough."""
