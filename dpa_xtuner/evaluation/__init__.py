"""Evaluation through OpenCompass and VLMEvalKit: from a LLaVA folder to the paper's table.

Nothing in here imports XTuner or DeepSpeed, nor this package's parts that need them.
"""
