"""The relevance-weighted loss: from hidden states to scores, weights and one number."""

from dpa_xtuner.loss.relevance import NORMALIZE, RelevanceLoss, relevance_loss, statistics
from dpa_xtuner.loss.scores import TokenScores, scores_of_logits, token_scores
from dpa_xtuner.loss.weighting import CAL, CMO, Contrast, Uniform, Weights, build_scheme

__all__ = [
    "CAL",
    "CMO",
    "NORMALIZE",
    "Contrast",
    "RelevanceLoss",
    "TokenScores",
    "Uniform",
    "Weights",
    "build_scheme",
    "relevance_loss",
    "scores_of_logits",
    "statistics",
    "token_scores",
]
