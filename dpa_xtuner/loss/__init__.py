"""The relevance-weighted loss: from hidden states to log-probabilities, weights and one number."""

from dpa_xtuner.loss.head import TokenLogProbs, token_log_probs
from dpa_xtuner.loss.objective import IGNORE_INDEX, Objective, supervised_mask
from dpa_xtuner.loss.relevance import NORMALIZE, RelevanceLoss, relevance_loss, statistics
from dpa_xtuner.loss.weighting import (
    CAL,
    CMO,
    Contrast,
    ContrastScheme,
    TokenWeights,
    Uniform,
    WeightingScheme,
    build_scheme,
)
