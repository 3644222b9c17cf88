"""One HTML file that shows a run. It needs no network, no other file, and no script to be read.

`gather` reads the run directory, and `curves` its metrics.csv. `chart` computes the positions in
the SVG. `page` fills page.html, with drawn.html for the SVG, and adds page.css and page.js.
"""
