"""Work in units, done by one process, several, or a cluster, in which every unit counts exactly once, whoever dies."""
