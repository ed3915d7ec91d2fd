"""What is learned from a batch: one file an objective, each a function from the answers' scores to a loss.

    sft                          -log p of every label, one mean over the labels of the step
    dpo, ipo, simpo, orpo        a preferred answer against another
    kto                          answers that are wanted or not, each by itself
    rank                         one right answer among several

A score is the sum of the log-probabilities of an answer's labels. Whatever a loss makes of the scores, its gradient is
that of a sum of label losses, each with a weight: so the model only ever sees weighted labels (`by_scores.py`). A new
objective is one file with `loss` and `measure` beside these, and one line in `trietune/run/objective.py`.
"""
