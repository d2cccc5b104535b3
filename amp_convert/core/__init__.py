"""What every stage stands on: errors, number formats, what operators do, devices, error sums."""
