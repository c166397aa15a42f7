"""What a run will take, by arithmetic before anything is loaded: tokens, FLOPs, memory, traffic, seconds."""
