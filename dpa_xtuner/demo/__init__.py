"""A small real run on one machine: SmolLM2-135M, OpenMoji drawings, no GPU and no hub."""
