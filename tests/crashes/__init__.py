"""The crash harness: orders while things break, and whether ledger, journal and what hosts were told agree afterwards."""
