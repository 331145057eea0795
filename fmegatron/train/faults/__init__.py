"""What can go wrong while a run trains, and what is done about it: see docs/faults.md."""
