"""What every training shares: averages of weights, schedules, processes, settings of the CPU."""
