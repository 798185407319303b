"""The models: XTuner's, with the loss, the adapter and the projector at their seams."""
