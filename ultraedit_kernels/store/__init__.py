"""What is kept in files: deltas and the journal of versions. Tensors and metadata only."""
