"""XTuner's training script; what XTuner imports may print to a reader that is gone."""

import dpa_xtuner.plugin  # noqa: F401

if __name__ == "__main__":
    from xtuner.tools.train import main

    main()
