"""Tries whose rows are laid out whole, for networks that cannot be told what a node sees.

grid        the rows of a trie as a grid, and which position of it holds which node
products    what computes positions one by one runs once a node, whatever the grid repeats
pieces      micro-batches cut so that their grids fit
"""
