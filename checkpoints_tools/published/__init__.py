"""The tensors of every published checkpoint: names and shapes as tables, and which file this is (`identify`)."""
