"""What a run leaves behind for people: result files, a table, and a report with curves."""
