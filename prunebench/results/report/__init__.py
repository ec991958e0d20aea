"""`prunebench report`: the shared table as one page that needs nothing but a browser, and figures.

`data` prepares, `charts` draws, `drawing` writes SVG, `page` fills the template, `figures` writes
files for a paper. The shapes of a figure are placed once, for page and paper alike.
"""
