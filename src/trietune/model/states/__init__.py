"""Layers that carry a state from token to token: short convolutions and recurrent scans, computed on a trie.

kinds      the functions of transformers that mix positions, known by the arguments that they take
hand_on    a network's layers call these functions for nodes of a trie, or for rows that decode
scan       a scan by segments of a trie, and a causal window behind the nodes above each row

Such a layer mixes positions in one or two functions of its file; projections, gates, norms and its output see one
position each and run as they are, once per node. So only what these functions are given is laid out again.
"""

from trietune.model.states.hand_on import carries_states, carry_states, scans_states
from trietune.model.states.kinds import Carrier, Place, Run

__all__ = ["Carrier", "Place", "Run", "carries_states", "carry_states", "scans_states"]
