"""The report of a run or a search: one HTML page with its charts as inline SVG, made from the run folder's records."""
