"""From answers to better weights: groups and their rewards, advantages, loss, the update, and the engine beneath it."""
