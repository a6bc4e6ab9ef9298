"""What operations cost: host profiles, the lock as a queue, stalls and slowdown. Behaviour never imports it."""
