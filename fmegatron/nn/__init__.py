"""Building blocks: declarations of parameters and pure functions of named tensors. They know names, and no mesh."""
