"""What happened to each parameter: rows, totals, rendering."""
