"""One HTML file that shows a run: `gather` reads the run directory, `curves` its metrics.csv, `page` lays it out with
`chart` and `markup`. The file needs nothing else: no network, no other file, and no script to be read."""
