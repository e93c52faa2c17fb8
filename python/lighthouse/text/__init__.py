"""Text to train on: found, read, held out and cut into rows of tokens. Knows nothing of models."""
