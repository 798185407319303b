"""Evaluation through OpenCompass and VLMEvalKit: from a LLaVA folder to the paper's table.

Nothing here imports XTuner or DeepSpeed, nor a module that needs them.
"""
