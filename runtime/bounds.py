"""Upper bounds of the numbers that size work: more is probably a typo, or would never end.

They are checked before anything is made.  The bound of a grid's nodes is with the grids, in
`solvers.grids.MOST_NODES`; that of seeds is in `runtime.seeds`.
"""

from __future__ import annotations

MOST_BATCH = 65_536  #: images at once: 800 MB of 32x32 pixels, before the network takes any
MOST_SIDE = 8192  #: pixels along a side; 256 times the pixels of the largest model here
MOST_THREADS = 1024  #: of a process, and processes that load images
MOST_BLOCKS = 10_000  #: parts that a spread is computed of, reports, columns of a picture
MOST_WIDTH = 65_536  #: units of a layer: a square matrix of them has 17 GB
MOST_UPDATES = 10_000_000  #: steps of a training, each of which may add a row to its files
MOST_SEARCHED = 200  #: evaluations of a plan that is searched for: five times the published tables
MOST_IMAGES = 10_000_000  #: of a set, of a row, of a cloud of points
MOST_SEED = 2**32 - 1  #: of one draw; times a million it still fits into 64 bits
MOST_LAYERS = 100  #: of a kind in a part of a network; the deepest known one has 48
