"""The method on tensors, without Transformers: settings, plan, operators and the functional call."""
