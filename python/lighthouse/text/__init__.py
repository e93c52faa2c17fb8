"""Text to train on: found, read, held out and made into rows of tokens. Knows nothing of models."""
