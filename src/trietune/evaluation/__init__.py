"""How good a model is, and what it says: metrics, label scoring, generation, prediction."""

from trietune.evaluation.evaluate import Evaluation, Prediction, evaluate_model
from trietune.evaluation.generation import GenerationLimits, generate
from trietune.evaluation.predict import LabelPrediction, answer_turn, predict_labels, predict_text

__all__ = [
    "Evaluation",
    "GenerationLimits",
    "LabelPrediction",
    "Prediction",
    "answer_turn",
    "evaluate_model",
    "generate",
    "predict_labels",
    "predict_text",
]
