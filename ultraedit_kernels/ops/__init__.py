"""The four operations on tensors, their backends, and what is compiled ahead of time."""
