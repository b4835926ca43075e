"""What `fmzbus new-venue` writes: venue.py and test_venue.py, real modules that are linted, typed and tested like all others."""
