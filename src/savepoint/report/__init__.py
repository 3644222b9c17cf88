"""One HTML file that shows a run. It needs no network, no other file, and no script to be read.

`gather` reads the run directory, `curves` its metrics.csv; `chart` says what stands where in the
pictures; `page` fills page.html, and drawn.html with the SVG, and puts page.css and page.js in.
"""
