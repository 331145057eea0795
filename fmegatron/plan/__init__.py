"""Planning without the hardware: memory, traffic, seconds and MFU of a run on a mesh that need not exist."""
