"""Pure tensors: masks, patterns, selection, criteria, allocations, schedules, costs, named generators."""
