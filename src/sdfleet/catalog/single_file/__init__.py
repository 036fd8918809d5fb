"""Checkpoints in one file, in the layout their authors published: told from names and shapes, never read as a whole.

Each file here translates one network: from the tensors' names in the file to those of the component, and from their
shapes to its config.json. `layout.py` tells what a file is, `folder.py` writes what an import leaves on the disk.
"""
