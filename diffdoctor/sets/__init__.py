"""Sets of shards as wholes: whether they are intact, what they hold, what they hold twice, and several as one."""
