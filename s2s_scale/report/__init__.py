"""The results of a run for readers: result files, a table, and a report with plots."""
