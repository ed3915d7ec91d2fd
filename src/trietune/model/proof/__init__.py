"""A proof for every layer: what a run computes is compared with plain rows through transformers, part by part.

forests    the rows and nodes that are compared, and where each node lies
parts      what is compared: layers, their children, their kinds; parts in fp32 for the time of a call
passes     record plain rows through transformers' own code; hand the same inputs to the code of the run
ways       all ways in which a run's attention may compute
bounds     how large an error may be
ladder     what a layer falls back to until it is proven, and what is said or refused
"""

from trietune.model.proof.forests import Forest, forest_of, random_forests, training_forests
from trietune.model.proof.ladder import Proof, prove

__all__ = ["Forest", "Proof", "forest_of", "prove", "random_forests", "training_forests"]
