"""XTuner's training script, which survives when the reader of its output is gone."""

import dpa_xtuner.plugin  # noqa: F401

if __name__ == "__main__":
    from xtuner.tools.train import main

    main()
