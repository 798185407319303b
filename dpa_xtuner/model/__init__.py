"""The models: XTuner's classes with our loss, adapter and projector."""
