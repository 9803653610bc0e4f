"""What keeps a run going: the loop, checkpoints, processes and signals, files, logs."""
