"""Engines of other projects, each in a process and a virtual environment of its own.

Their pins contradict ours, so nothing of our environment is on their path but this package (`launch.py`). What is
imported here at the top of a file is the standard library and sdfleet; theirs is imported when an engine is opened.

    turns.py          one thread that plays their loops, a step at a time
    guest.py          the face that `engine/child.py` knows, over any of them
    fitting.py        which folders and requests they can draw; also asked by the parent process
    mflux.py          mflux: Z-Image, FLUX.1, FLUX.2 klein
    diffusionkit.py   DiffusionKit: Stable Diffusion 3
"""
