"""The axes of a pruning method: scores, budgets, schedules, regrowth, and the loop that drives them."""
